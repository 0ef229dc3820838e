"""However a run is spread over ranks, it computes the same, and its checkpoints open everywhere."""

import contextlib
import functools
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import mae
from mae import config
from mae.data.batch import normalise
from mae.data.loader import train_batches
from mae.data.sources import open_splits
from mae.errors import ConfigError, Preempted
from mae.keys import Run
from mae.nets.precision import computing
from mae.training import blocks, checkpoint, optim, parallel, schedule, state
from mae.training.distributed import Ranks
from mae.training.loop import Hooks, fit
from mae.training.progress import Progress
from mae.training.run import RunFolder
from mae.training.saving import Saver

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = ["encoder.embed_dim=32", "encoder.depth=2", "train.log_every=1", "optim.warmup_epochs=0", "optim.name=adamw", "optim.base_lr=1e-3"]
MAE = [*TINY, "train.batch_size=24", "train.steps=3", "train.accumulate=2", "train.ema=0.9", "optim.clip=1"]
LEARNING = sorted({p.stem for p in (config.configs_folder() / "methods").glob("*.yaml")} - {"pca", "pixels", "untrained"})


class Trained:
    """A method that was trained by the real loop under an engine, from a checkpoint if one is given."""

    def __init__(self, engine, ranks, words, *, start=None, settled=True, precision="fp32", until=None):
        self.config, self.ranks, self.rows = config.load(words), ranks, []
        splits = open_splits(self.config.data)
        method = mae.create(words)
        blocks.recompute(method, self.config.train.recompute)
        self.spread = parallel.Spread(engine, method, ranks)
        if self.config.train.compile:
            self.spread.compile()
        self.module = self.spread.module.train()
        self.optimizer = optim.create(self.module, self.config.optim)
        self.average = optim.Average(self.module, self.config.train.ema) if self.config.train.ema is not None else None
        self.progress = Progress()
        wrapped = self.spread.wrapped()
        if start is not None:
            if settled:
                self.spread.settle(lambda: wrapped(torch.zeros(4, 1, 8, 8), keys=torch.arange(4)).loss)
            stored, scalars = checkpoint.load(start)
            state.restore(stored, scalars, self.module, self.optimizer, self.average)
            self.progress = Progress(**scalars["progress"])
        accumulate = 1 if self.config.train.accumulate == "auto" else self.config.train.accumulate
        plan = schedule.plan(self.config, len(splits.train))
        with contextlib.suppress(Preempted):
            fit(
                wrapped,
                lambda module, batch: module(normalise(batch.images, self.config.data), keys=batch.keys),
                train_batches(
                    splits.train,
                    self.config,
                    first_step=self.progress.step,
                    device=CPU,
                    rank=ranks.rank,
                    world=ranks.world,
                    accumulate=accumulate,
                ),
                optimizer=self.optimizer,
                average=self.average,
                scaler=torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
                plan=plan,
                progress=self.progress,
                config=self.config,
                precision=precision,
                ranks=ranks,
                hooks=Hooks(log=self.rows.append, save=print, evaluate=print, picture=print, stop=lambda: self.progress.step == until),
            )

    def figures(self):
        """(2, steps) losses and gradient norms."""
        return torch.tensor([[row[name] for row in self.rows] for name in ("loss", "grad_norm")], dtype=torch.float64)

    def tensors(self):
        """Weights, moments and average, whole on every rank."""
        tensors, _ = state.take(self.module, self.optimizer, self.average)
        return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in tensors.items()}

    def save(self, folder):
        """Commits a checkpoint as a run does, and returns where it lies."""
        tensors, scalars = state.take(self.module, self.optimizer, self.average)
        saver = Saver(RunFolder(folder), Run(), self.ranks, {"config": "c", "data": "d"})
        saver.save(self.progress.step, tensors, scalars | {"progress": {"step": self.progress.step}}, samples=0)
        return saver.find()


def spread(rank, world, folder, engines, words):
    """Trains and saves under each engine; then each takes up every checkpoint in the folder, trained no further."""
    ranks, kept = Ranks(rank, world, CPU), {}
    for engine in engines:
        trained = Trained(engine, ranks, words)
        where = trained.save(Path(folder) / f"{engine}{world}")
        kept[engine] = {"figures": trained.figures(), "tensors": trained.tensors(), "where": str(where)}
    for engine in engines:
        for start in sorted(Path(folder).glob("*/checkpoints/step-*")):
            kept[engine][start.parts[-3]] = Trained(engine, ranks, words, start=start).tensors()
    return kept


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def close(trained, figures):
    torch.testing.assert_close(trained, figures, rtol=1e-5, atol=1e-6)


def alone(words, **how):
    return Trained("plain", Ranks(0, 1, CPU), words, **how)


def test_engines_compute_the_same_and_open_each_others_checkpoints(tmp_path):
    plain = alone(MAE)
    assert plain.figures().shape == (2, 3)
    saved = plain.save(tmp_path / "plain")
    first, second = on_ranks(spread, tmp_path, 2, str(tmp_path), ["ddp", "fsdp"], MAE)
    for engine in ("ddp", "fsdp"):
        close(first[engine]["figures"], plain.figures())
        assert same(first[engine]["tensors"], second[engine]["tensors"])
        assert same(first[engine]["plain"], plain.tensors())  # read by each rank, its rows alone, and gathered again
        assert same(first[engine]["ddp2"], first["ddp"]["tensors"])
        assert same(first[engine]["fsdp2"], first["fsdp"]["tensors"])
        where = Path(first[engine]["where"])
        assert checkpoint.verify(where) is None
        assert same(alone(MAE, start=where).tensors(), first[engine]["tensors"])
        weights = checkpoint.weights_of(where)
        assert mae.create(MAE).load_state_dict(weights, strict=True)
        assert torch.equal(weights["encoder.norm.weight"], first[engine]["tensors"]["average.encoder.norm.weight"])
    shares = [f"state-0000{rank}-of-00002.safetensors" for rank in range(2)]
    assert sorted(p.name for p in where.iterdir()) == ["manifest.json", *shares, "state.json"]
    assert sorted(p.name for p in saved.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    assert not list(tmp_path.rglob("*tmp*"))


@pytest.mark.parametrize("words", [[], ["configs/methods/crossmae.yaml"], ["configs/methods/vae.yaml"]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(words, precision):
    """Selectively, no matrix product is repeated."""
    gradients, names, flops = [], [], []
    for how in (False, True, "selective"):
        method = mae.create([*TINY, *words]).train()
        blocks.recompute(method, how)
        generator = torch.Generator().manual_seed(0)
        with FlopCounterMode(display=False) as counter:
            with computing(precision, CPU):
                loss = method(torch.randn(8, 1, 8, 8, generator=generator), keys=torch.arange(8)).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.requires_grad})
        names.append(list(method.state_dict()))
        flops.append(counter.get_total_flops())
    assert same(gradients[0], gradients[1])
    assert same(gradients[0], gradients[2])
    assert names[0] == names[1] == names[2]
    assert flops[0] == flops[2] < flops[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.name=muon"], "needs whole matrices"),
        (["configs/methods/contractive.yaml", "method.penalty=hutchinson"], "differentiates twice"),
        (["configs/methods/vq_vae.yaml", "method.codebook=gradient"], "writes to its parameters"),
        (["configs/methods/kl_ae.yaml"], "log_scale is a single number"),
    ],
)
def test_what_cannot_be_cut_up_is_refused_in_one_sentence(words, says):
    with pytest.raises(ConfigError, match=says):
        parallel.choose("fsdp", mae.create([*TINY, *words]), config.load([*TINY, *words]).optim, average=False, ranks=Ranks(0, 1, CPU))
    if says == "differentiates twice":
        with pytest.raises(ConfigError, match=r"train\.recompute=false"):
            blocks.recompute(mae.create([*TINY, *words]), True)


def test_the_engine_follows_from_sizes(tmp_path):
    with torch.device("meta"):
        giant = torch.nn.Linear(2**20, 2**20)  # 16 TiB with its moments
    adamw, muon = (config.load([f"optim.name={name}"]).optim for name in ("adamw", "muon"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = [
            parallel.choose("auto", module, settings, average=False, ranks=Ranks(0, 2, CPU))
            for module, settings in ((mae.create(TINY), adamw), (giant, adamw), (giant, muon))
        ]
    finally:
        dist.destroy_process_group()
    assert [engine.name for engine in found] == ["ddp", "fsdp", "ddp"]
    assert "less than half" in found[0].reason
    assert "take 1.64e+04 GiB, more than half" in found[1].reason
    assert "but optim.name=muon needs whole matrices" in found[2].reason


def resumed(rank, world, folder, engine):
    """What a run of six steps ends with: uninterrupted, resumed after three, and resumed without a settled order."""
    ranks, words = Ranks(rank, world, CPU), [*MAE, "train.steps=6"]
    straight = Trained(engine, ranks, words).tensors()
    where = Trained(engine, ranks, words, until=3).save(Path(folder) / engine)
    ways = {str(settled): Trained(engine, ranks, words, start=where, settled=settled).tensors() for settled in (True, False)}
    return {"straight": straight, **ways}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_resumed_run_sums_in_the_same_order_on_three_ranks(engine, tmp_path):
    for found in on_ranks(resumed, tmp_path, 3, str(tmp_path), engine):
        assert same(found["straight"], found["True"])
        assert same(found["straight"], found["False"]) == (engine == "fsdp")  # it is the settling that does it


@pytest.mark.slow
def test_any_number_of_ranks_opens_what_another_wrote(tmp_path):
    plain = alone(MAE)
    two = on_ranks(spread, tmp_path, 2, str(tmp_path), ["fsdp"], MAE)
    four = on_ranks(spread, tmp_path, 4, str(tmp_path), ["fsdp", "ddp"], MAE)
    three = on_ranks(spread, tmp_path, 3, str(tmp_path), ["fsdp", "ddp"], [*MAE, "train.accumulate=4"])
    for found in (*four, *three):
        for engine in ("fsdp", "ddp"):
            close(found[engine]["figures"], plain.figures())
            assert same(found[engine]["fsdp2"], two[0]["fsdp"]["tensors"])
    for engine in ("fsdp", "ddp"):
        assert same(three[0]["fsdp"][f"{engine}4"], four[0][engine]["tensors"])
        assert same(alone(MAE, start=Path(three[0][engine]["where"])).tensors(), three[0][engine]["tensors"])


METHOD = [*TINY, "train.batch_size=24", "train.steps=3", "train.precision=fp32", "optim.base_lr=1e-4"]


def figures_of_methods(rank, world, engines):
    found = {}
    for name in LEARNING:
        words = [f"configs/methods/{name}.yaml", *METHOD]
        for engine in engines:
            if (name, engine) != ("kl_ae", "fsdp"):  # refused
                found[f"{name} {engine}"] = Trained(engine, Ranks(rank, world, CPU), words).figures()
    return found


@pytest.mark.slow
def test_every_method_is_the_same_under_every_engine(tmp_path):
    plain = figures_of_methods(0, 1, ["plain"])
    for found in on_ranks(figures_of_methods, tmp_path, 2, ["ddp", "fsdp"]):
        for name, figures in found.items():
            torch.testing.assert_close(figures, plain[f"{name.split()[0]} plain"], rtol=1e-5, atol=1e-6, msg=name)


def figures_of_settings(rank, world, engines):
    found = {}
    for engine in engines:
        again = ["train.recompute=true"], ["train.recompute=selective"]
        for words in (*again, ["train.compile=true"], *(["train.compile=true", *how] for how in again)):
            found[f"{engine} {words}"] = Trained(engine, Ranks(rank, world, CPU), [*MAE, *words]).figures()
        for precision in ("bf16", "fp16"):
            found[f"{engine} {precision}"] = Trained(engine, Ranks(rank, world, CPU), MAE, precision=precision).figures()
    return found


@pytest.mark.slow
def test_blocks_that_are_dropped_at_rates_of_their_own_are_all_compiled(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    sizes = dict(img_size=32, patch_size=16, depth=12, embed_dim=32, num_heads=1)
    for rate, graphs in ((0.0, 1), (0.1, 12)):  # the first block is never dropped
        model = timm.create_model("vit_tiny_patch16_224", **sizes, drop_path_rate=rate).train()
        with torch._dynamo.config.patch(recompile_limit=8):  # put back in the end
            blocks.compile_parts(model, by_block=True)
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_recomputation_compilation_and_half_precision_work_under_every_engine(tmp_path):
    plain, reference = figures_of_settings(0, 1, ["plain"]), alone(MAE).figures()
    found = on_ranks(figures_of_settings, tmp_path, 2, ["ddp", "fsdp"])[0]
    for name, figures in (plain | found).items():
        close_to = plain["plain " + name.split()[1]] if name.endswith("16") else reference
        torch.testing.assert_close(figures, close_to, rtol=2e-2 if name.endswith("16") else 1e-5, atol=1e-6, msg=name)
    for how in ("true", "selective"):
        assert torch.equal(plain[f"plain ['train.recompute={how}']"], reference)
