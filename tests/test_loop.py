"""The loop itself: precision, accumulation, averaging, and what a bad step may not do."""

import os
import signal

import pytest
import torch

import mae
from mae import config
from mae.data.batch import normalise
from mae.data.loader import train_batches
from mae.data.sources import open_splits
from mae.errors import NonFiniteLoss, Preempted
from mae.nets import precision as formats
from mae.training import optim, schedule
from mae.training.distributed import Ranks
from mae.training.loop import Hooks, fit
from mae.training.progress import Progress
from mae.training.signals import Stop

WORDS = ["encoder.embed_dim=32", "encoder.depth=2", "train.batch_size=64", "train.log_every=1", "train.steps=40"]


def train(*words, precision="fp32", accumulate=1, poison_at=None, stop_at=None, device="cpu", compiled=False, at_step=None):
    """Trains on the digits in this process and returns (method, rows, average, saved steps); `at_step` hears of each step."""
    cfg = config.load([*WORDS, *words])
    splits = open_splits(cfg.data)
    method = mae.create([*WORDS, *words]).to(device).train()
    if compiled:
        method.compile()
    optimizer = optim.create(method, cfg.optim)
    average = optim.Average(method, cfg.train.ema) if cfg.train.ema is not None else None
    rows, saved, progress = [], [], Progress()

    def forward(module, batch):
        if at_step is not None:
            at_step(progress.step)
        images = normalise(batch.images, cfg.data)
        if progress.step == poison_at:
            images[0] = torch.nan
        return module(images, keys=batch.keys)

    try:
        fit(
            method,
            forward,
            train_batches(splits.train, cfg, first_step=0, device=torch.device(device), accumulate=accumulate),
            optimizer=optimizer,
            average=average,
            scaler=torch.amp.GradScaler(device, enabled=precision == "fp16"),
            plan=schedule.plan(cfg, len(splits.train)),
            progress=progress,
            config=cfg,
            precision=precision,
            ranks=Ranks(0, 1, torch.device(device)),
            hooks=Hooks(
                log=rows.append,
                save=lambda p: saved.append(p.step),
                picture=print,
                evaluate=lambda step: None,
                stop=lambda: progress.step == stop_at,
            ),
        )
    except (NonFiniteLoss, Preempted) as error:
        rows.append(error)
    return method, rows, average, saved


def weights(method):
    return torch.cat([p.detach().flatten() for p in method.parameters()])


@pytest.fixture(scope="module")
def plain():
    return train()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_to_the_same_loss_within_three_percent(plain, precision):
    _, rows, _, _ = train(precision=precision)
    assert [r["batch_hash"] for r in rows] == [r["batch_hash"] for r in plain[1]]
    tail = [sum(r["loss"] for r in run[-10:]) / 10 for run in (rows, plain[1])]
    assert tail[0] == pytest.approx(tail[1], rel=0.03)


def test_accumulation_changes_nothing_but_rounding(plain):
    _, rows, _, _ = train(accumulate=4)
    assert [r["batch_hash"] for r in rows] == [r["batch_hash"] for r in plain[1]]
    assert [r["loss"] for r in rows[:20]] == pytest.approx([r["loss"] for r in plain[1][:20]], rel=1e-5)


def test_a_poisoned_batch_stops_the_run_and_touches_no_weight():
    before, _, _, _ = train("train.steps=3", "optim.warmup_epochs=0")
    straight, _, _, _ = train("train.steps=40", "optim.warmup_epochs=0", stop_at=3)
    poisoned, rows, _, saved = train("train.steps=40", "optim.warmup_epochs=0", "train.skip_updates=0", poison_at=3)
    assert isinstance(rows[-1], NonFiniteLoss)
    assert torch.equal(weights(poisoned), weights(straight))
    assert not torch.equal(weights(poisoned), weights(before))  # another schedule: the comparison can fail
    assert saved == []


def test_a_stop_is_obeyed_after_saving():
    _, rows, _, saved = train("train.checkpoint_every=5", stop_at=7)
    assert isinstance(rows[-1], Preempted)
    assert saved == [5, 7]


def test_the_average_lags_behind_the_weights():
    method, _, average, _ = train("train.ema=0.9")
    shadow = torch.cat([average.shadow[n].flatten() for n in average.parameters])
    current = torch.cat([p.detach().flatten() for p in average.parameters.values()])
    assert not torch.equal(shadow, current)
    average.swap()
    assert torch.equal(torch.cat([p.detach().flatten() for p in average.parameters.values()]), shadow)
    average.swap()
    assert torch.equal(torch.cat([p.detach().flatten() for p in average.parameters.values()]), current)
    assert method is not None


def test_clipping_bounds_the_step_not_the_logged_norm():
    words = ["optim.clip=0.01", "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.warmup_epochs=0", "optim.base_lr=100"]
    moved, rows, _, _ = train(*words, "train.steps=1")
    assert rows[0]["grad_norm"] > 0.01
    assert (weights(moved) - weights(mae.create(WORDS))).norm() == pytest.approx(0.01 * 100 * 64 / 256, rel=1e-3)


@pytest.mark.parametrize(("wanted", "hardware", "warned"), [("bf16", False, True), ("bf16", True, False), ("auto", False, False)])
def test_bf16_in_software_is_warned_of(wanted, hardware, warned, monkeypatch, caplog):
    monkeypatch.setattr(formats, "cpu_has_bf16", lambda: hardware)
    formats._warn_of_software.cache_clear()
    chosen = formats.choose(wanted, torch.device("cpu"))
    assert chosen == ("fp32" if wanted == "auto" else "bf16")
    assert ("train.precision=auto takes float32 here" in caplog.text) == warned


@pytest.mark.slow
def test_a_compiled_method_has_the_same_losses(plain):
    _, rows, _, _ = train(compiled=True)
    assert [r["loss"] for r in rows[:20]] == pytest.approx([r["loss"] for r in plain[1][:20]], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_to_the_same_loss_and_skips_a_poisoned_update_on_the_device(plain, precision):
    _, rows, _, _ = train(precision=precision, device="cuda")
    assert [r["batch_hash"] for r in rows] == [r["batch_hash"] for r in plain[1]]
    assert rows[-1]["loss"] == pytest.approx(plain[1][-1]["loss"], rel=0.05)
    poisoned, rows, _, _ = train("train.log_every=20", "train.skip_updates=0", precision=precision, device="cuda", poison_at=3)
    assert isinstance(rows[-1], NonFiniteLoss)
    assert torch.isfinite(weights(poisoned)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "muon", "lars", "sgd"])
def test_a_gpu_is_not_waited_for_between_logged_steps(name):
    def watched(step):
        torch.cuda.set_sync_debug_mode("error" if 0 < step < 9 else "default")

    method, _, _, _ = train(f"optim.name={name}", "train.steps=10", "train.log_every=10", device="cuda", at_step=watched)
    assert torch.isfinite(weights(method)).all()


def test_a_closed_terminal_is_a_reason_to_stop_unless_it_is_to_be_ignored():
    before = signal.getsignal(signal.SIGHUP)  # ignored where the tests themselves run under nohup
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, handler)
            with Stop() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.asked == (handler == signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
