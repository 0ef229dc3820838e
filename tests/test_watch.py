"""What is watched: steps that would spoil the weights, losses that leap, ranks that drift apart, and those who must not hold a run up."""

import json
import math
import os
import signal
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from safetensors.torch import load_file
from torch import nn

import mae
from mae import config
from mae.commands import job
from mae.data.batch import normalise
from mae.data.loader import train_batches
from mae.data.sources import open_splits
from mae.errors import ConfigError, LossSpike, NonFiniteLoss, Preempted, ReplicasDiffer
from mae.nets.precision import DTYPES
from mae.training import optim, schedule, watch
from mae.training.alarms import told
from mae.training.distributed import Ranks
from mae.training.loop import Hooks, fit
from mae.training.progress import Progress
from mae.training.run import RunFolder

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
WORDS = ["encoder.embed_dim=32", "encoder.depth=1", "train.batch_size=32", "train.log_every=1", "train.precision=fp32", "train.ema=0.9"]
WORDS += ["optim.warmup_epochs=0", "data.crop_scale=[1,1]", "track.wandb=off"]


def steps(*words, ranks=ALONE, poisoned=(), on_rank=0, precision="fp32"):
    """The state after every step of a few on the digits, where the images of some steps are NaN on one rank."""
    cfg = config.load([*WORDS, *words])
    splits, progress, seen = open_splits(cfg.data), Progress(), []
    method = mae.create([*WORDS, *words]).train()
    module = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False) if ranks.world > 1 else method
    optimizer, average = optim.create(method, cfg.optim), optim.Average(method, cfg.train.ema)

    def forward(module, batch):
        images = normalise(batch.images, cfg.data)
        if progress.step in poisoned and ranks.rank == on_rank:
            images[0] = torch.nan
        return module(images, keys=batch.keys)

    def note(row):
        moments = [v for p in method.parameters() for v in optimizer.state[p].values()]
        seen.append([x.detach().clone() for x in (*method.state_dict().values(), *moments, *average.shadow.values())])

    try:
        fit(
            module,
            forward,
            train_batches(splits.train, cfg, first_step=0, device=CPU, rank=ranks.rank, world=ranks.world),
            optimizer=optimizer,
            average=average,
            scaler=torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
            plan=schedule.plan(cfg, len(splits.train)),
            progress=progress,
            config=cfg,
            precision=precision,
            ranks=ranks,
            hooks=Hooks(log=note, save=lambda p: None, picture=print, evaluate=print, stop=lambda: False),
        )
    except NonFiniteLoss as error:
        seen.append(error)
    return seen, progress, method


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["mae", "vq_vae"])  # the second moves its codebook in the forward pass
def test_a_poisoned_step_leaves_weights_moments_average_and_buffers_as_they_were(method):
    seen, progress, _ = steps(f"method.name={method}", "train.steps=6", poisoned=(2, 3))
    assert same(seen[1], seen[2])
    assert same(seen[1], seen[3])
    assert not same(seen[3], seen[4])
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (6, 2, 0)
    assert all(torch.isfinite(x).all() for x in seen[-1])


@pytest.mark.parametrize(
    ("codebook", "precision"), [("ema", "fp16"), *(pytest.param(kind, "fp32", marks=pytest.mark.slow) for kind in ("ema", "gradient"))]
)
def test_a_codebook_starts_at_the_first_step_that_is_kept(codebook, precision):
    words = ("method.name=vq_vae", f"method.codebook={codebook}", "train.steps=4")
    splits, found = open_splits(config.load([]).data), []
    images = torch.stack([torch.from_numpy(splits.train.read(i)).permute(2, 0, 1) for i in range(64)]) / 255
    for poisoned in ((), (0,)):
        _, _, method = steps(*words, poisoned=poisoned, precision=precision)
        assert method.quantiser.started
        found.append(method.eval().diagnose([(images, torch.arange(64))]).figures["perplexity"])
    assert found[1] > 0.8 * found[0] > 5


def test_one_too_many_in_a_row_ends_the_run_in_a_sentence():
    seen, _, method = steps("train.steps=9", "train.skip_updates=2", poisoned=(1, 3, 4, 5))
    assert "3 steps in a row from step 3 on" in str(seen[-1])
    assert same(seen[2], seen[4])
    assert same(seen[2][: len(method.state_dict())], method.state_dict().values())


def on_a_rank(rank, world):
    """A NaN on rank 1 alone; then a flipped bit there. What both ranks hold, and what they say."""
    ranks = Ranks(rank, world, CPU)
    seen, progress, method = steps("train.steps=5", ranks=ranks, poisoned=(2,), on_rank=1)
    watch.compare_replicas(method, ranks)
    with torch.no_grad():
        if rank == 1:
            list(method.parameters())[-1].view(torch.int32).view(-1)[3] ^= 1
    try:
        watch.compare_replicas(method, ranks)
        said = ""
    except ReplicasDiffer as error:
        said = str(error)
    words = torch.tensor(list(said.encode()), dtype=torch.uint8)
    return [torch.cat([x.flatten().double() for x in state]) for state in seen], progress.skipped, words


def test_a_nan_on_one_rank_is_skipped_on_both_and_a_flipped_bit_is_found(tmp_path):
    (one, skipped, said), (two, skipped_too, said_too) = on_ranks(on_a_rank, tmp_path, 2)
    assert (skipped, skipped_too) == (1, 1)
    assert same(one, two)
    assert torch.equal(one[1], one[2])
    assert not torch.equal(one[2], one[3])
    sentence = bytes(said.tolist()).decode()
    assert sentence == bytes(said_too.tolist()).decode()
    assert sentence.startswith("rank 1 holds other weights than the other ranks (first in decoder.")


@pytest.mark.parametrize("name", ["adamw", "muon", "lars", "sgd"])
def test_the_device_decides_as_the_host_does(name):
    """Optimizers on the CPU read `found_inf` as they do on a GPU; the first step is among those that are not made."""
    words, ends = [f"optim.name={name}", "optim.base_lr=0.1", "optim.weight_decay=0.1", "optim.momentum=0.9"], []
    for on_device in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(OrderedDict(blocks=nn.Linear(4, 4)))
        optimizer = optim.create(module, config.load(words).optim)
        average = optim.Average(module, 0.5)
        progress = Progress()
        guard = watch.Guard(module, optimizer, torch.amp.GradScaler("cpu", enabled=False), progress, allowed=1, ranks=ALONE)
        if on_device:
            guard.on_device, optimizer.found_inf = True, guard.forbidden
        for step in range(8):
            loss = module(torch.full((2, 4), torch.nan if step in (0, 4, 5) else float(step))).square().mean()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
            if step == 5 and not on_device:
                with pytest.raises(NonFiniteLoss, match="2 steps in a row from step 4 on"):
                    guard.forbids(loss.detach(), norm)
                break
            if not guard.forbids(loss.detach(), norm):
                optimizer.step()
                average.update(guard.made())
            optimizer.zero_grad()
            progress.step += 1
        if on_device:
            with pytest.raises(NonFiniteLoss, match="4 steps in a row from step 4 on"):  # nothing was updated from there to the look
                guard.check(progress.step)
        ends.append([*module.parameters(), *average.shadow.values()])
        ends[-1] += [v for p in module.parameters() for v in optimizer.state[p].values()]
    torch.testing.assert_close(ends[0], ends[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(17, 80), st.floats(0.01, 100), st.floats(0, 0.1), st.integers(0, 1000))
def test_a_loss_that_stays_up_is_a_spike_and_noise_or_one_bad_batch_is_none(count, level, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = (level * (1 + noise * torch.randn(count, generator=generator).clamp(-3, 3))).tolist()
    progress = Progress()
    assert max(watch.note_loss(progress, x) for x in losses) < watch.SPIKE
    assert watch.note_loss(progress, 50 * level) < watch.SPIKE
    assert watch.note_loss(progress, level) < watch.SPIKE
    assert watch.note_loss(progress, float("nan")) < watch.SPIKE
    assert [watch.note_loss(progress, 50 * level) > watch.SPIKE for _ in range(3)] == [False, False, True]
    assert len(progress.losses) <= watch.KEPT


def train(folder, *words, bad=(), stop_at=None):
    """A job on the digits whose global batches numbered in `bad` spoil the loss; told to stop by a real signal at a row."""
    cfg = config.load([*WORDS, f"run.dir={folder}", "evaluate.protocols=[]", *words])
    splits = open_splits(cfg.data)
    first_keys = {int(next(train_batches(splits.train, cfg, first_step=n, device=CPU))[0].keys[0]) for n in bad}
    run, calls = RunFolder(folder), []

    def forward(module, batch):
        calls.append(batch.keys)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        output = module(normalise(batch.images, cfg.data), keys=batch.keys)
        return output._replace(loss=output.loss * 40) if int(batch.keys[0]) in first_keys else output

    story = job.Job(
        kind="pretrain",
        name="run",
        build=lambda: mae.create([*WORDS, *words]),
        forward=forward,
        loss=lambda module, images, keys: module(images, keys=keys),
        held_out=lambda *_, **__: {},
        finish=lambda *_: None,
    )
    job.run(story, cfg, run, splits, schedule.plan(cfg, len(splits.train)))
    return run


def logged(run, *keys):
    return [[row[k] for k in keys] for row in run.rows() if "loss" in row]


def state(run):
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    return load_file(newest / "state.safetensors"), json.loads((newest / "state.json").read_text())


SPIKY = ["train.steps=45", "train.checkpoint_every=10", "train.spike=10", "run.keep=2"]


def test_a_run_goes_back_before_a_spike_leaves_its_data_out_and_resumes_to_the_bit(tmp_path):
    bad = range(32, 40)
    whole = train(tmp_path / "whole", *SPIKY, bad=bad)
    assert [step for (step,) in logged(whole, "step")] == list(range(1, 46))  # each once
    alarms = told(whole.rows())
    assert len(alarms) == 2
    assert "training goes on from step 30 without the 5 batches" in alarms[0]
    assert "training goes on from step 30 without the 8 batches" in alarms[1]  # the spike was longer than what it took to see it
    tensors, scalars = state(whole)
    assert [scalars["progress"][k] for k in ("passed_over", "back_to", "roll_backs")] == [8, 30, 2]
    hashes = [h for (h,) in logged(whole, "batch_hash")]
    calm = [h for (h,) in logged(train(tmp_path / "calm", "train.steps=55"), "batch_hash")]
    assert hashes == calm[:30] + calm[38:53]
    with pytest.raises(Preempted):
        train(tmp_path / "cut", *SPIKY, bad=bad, stop_at=44)
    again = train(tmp_path / "cut", *SPIKY, bad=bad)
    resumed, scalars_too = state(again)
    assert resumed.keys() == tensors.keys()
    assert all(torch.equal(resumed[k], tensors[k]) for k in tensors)
    keys = ("step", "loss", "grad_norm", "batch_hash", "loss_excess", "skipped_updates")
    assert logged(again, *keys) == logged(whole, *keys)
    assert scalars_too["progress"] | {"seconds": 0} == scalars["progress"] | {"seconds": 0}


@pytest.mark.slow
def test_a_spike_that_comes_back_each_time_ends_the_run(tmp_path):
    with pytest.raises(LossSpike, match="going back 3 times has not helped"):
        train(tmp_path / "run", *SPIKY, bad=range(32, 90))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_going_back_needs_checkpoints_that_reach_back():
    with pytest.raises(ConfigError, match=r"raise run\.keep or train\.checkpoint_every"):
        config.load(["train.spike=10", "train.checkpoint_every=20"])
    with pytest.raises(ConfigError, match=r"train\.skip_updates -1"):
        config.load(["train.skip_updates=-1"])


def test_rows_tell_what_the_hardware_does_and_fp16_resumes_with_its_scale_to_the_bit(tmp_path):
    words = ["train.steps=24", "train.checkpoint_every=100", "train.precision=fp16", "optim.base_lr=0.01"]
    whole = train(tmp_path / "whole", *words)
    row = [row for row in whole.rows() if "loss" in row][-1]
    for figure in ("images_per_second", "memory_gib", "mfu"):
        assert row[figure] > 0
    assert 0 <= row["data_wait"] <= 1
    assert row["skipped_updates"] == 0  # what the scaler does about its own overflows is not counted
    with pytest.raises(Preempted):
        train(tmp_path / "cut", *words, stop_at=11)
    middle = state(RunFolder(tmp_path / "cut"))[1]
    assert (middle["progress"]["step"], middle["scaler"]["_growth_tracker"]) == (11, 11 - overflows(middle))
    resumed, scalars = state(train(tmp_path / "cut", *words))
    tensors, expected = state(whole)
    assert all(torch.equal(resumed[k], tensors[k]) for k in tensors)
    assert scalars["scaler"] == expected["scaler"]


def overflows(scalars):
    """How many steps the scaler has answered by halving its scale from 65,536."""
    return round(math.log2(65536 / scalars["scaler"]["scale"]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_moments_average_loss_and_gradients_are_float32_in_half_precision(precision):
    torch.manual_seed(0)
    seen, _, method = steps("train.steps=1", precision=precision)
    assert {x.dtype for x in seen[0] if x.is_floating_point()} == {torch.float32}
    with torch.autocast("cpu", DTYPES[precision]):
        output = method(torch.randn(2, 1, 8, 8), keys=torch.arange(2))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert {p.grad.dtype for p in method.parameters() if p.grad is not None} == {torch.float32}
