"""The tables of docs/scaling.md: `python -m mae.training.scaling` prints them."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mae import config
from mae.methods.build import build
from mae.training import estimate
from mae.training.arithmetic import Shape, shape_of
from mae.training.estimate import DEVICES, ROOM, Device, layout_for
from mae.training.parallel import SHARE

MODELS = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
}
RANKS = (1, 8, 64, 256, 1024)
BATCH = 4096  # the paper's global batch
WEAK = 64  # images a rank where the batch grows with the ranks
ETHERNET = 12.5e9  # bytes a second a node: 100 Gbit/s
RECOMPUTED: dict[bool | str, str] = {False: "no", "selective": "selective", True: "yes"}  # train.recompute, and how it is shown


def shapes() -> dict[str, Shape]:
    """The MAE of every model, built without memory."""
    words = ["configs/data/imagenet.yaml", "data.path=DIR", "configs/methods/mae.yaml", "train.epochs=1"]
    found = {}
    for name, encoder in MODELS.items():
        with torch.device("meta"):
            found[name] = shape_of(build(config.load([*words, f"encoder.name={encoder}"])))
    return found


def tables() -> str:
    """All tables, in Markdown."""
    found = shapes()
    device = DEVICES["h100"]
    parts = [
        ("What one model costs", _models(found)),
        (f"One batch of {BATCH:,} images on more and more GPUs (strong scaling, {device.name})", _strong(found, device)),
        (f"{WEAK} images a GPU, whatever their number (weak scaling, {device.name})", _weak(found, device)),
        (f"Whole copies or shares, on 64 GPUs at {WEAK} images each ({device.name})", _engines(found, device)),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts) + "\n"


def _models(found: dict[str, Shape]) -> str:
    rows = []
    for name, s in found.items():
        kept = [*(s.activations(half=True, recompute=again) for again in RECOMPUTED), s.activations(half=False)]
        state = estimate.state_bytes(s.parameters, trained=s.trained)
        rows.append(
            [
                name,
                f"{s.parameters / 1e6:.1f}",
                f"{s.encoder_parameters / 1e6:.1f}",
                f"{s.flops / 1e9:.1f}",
                f"{state / 1e9:.2f}",
                *(f"{k / 1e6:.1f}" for k in kept),
            ]
        )
    head = ["", "parameters, M", "of the encoder, M", "GFLOP an image", "state, GB"]
    return _table([*head, "activations an image, MB, bf16", "selective", "recomputed", "float32"], rows)


def _strong(found: dict[str, Shape], device: Device) -> str:
    rows = []
    for name, shape in found.items():
        alone = None
        for ranks in RANKS:
            sharded = _sharded(shape, device, ranks)
            layout = layout_for(shape, BATCH, ranks, ROOM * device.memory, sharded=sharded)
            if layout is None:
                continue
            took = estimate.seconds(shape, layout, device)
            slow = estimate.seconds(shape, layout, replace(device, network=ETHERNET))
            alone = alone or took * ranks
            cut = f"{layout.accumulate} x {layout.images}"
            facts = [f"{estimate.memory(shape, layout) / 1e9:.1f}", f"{estimate.traffic(shape, layout) / 1e9:.2f}", f"{1000 * took:.1f}"]
            shares = [f"{100 * alone / (ranks * t):.0f}" for t in (took, slow)]
            rows.append([name, f"{ranks:,}", _engine(sharded, ranks), cut, *facts, f"{BATCH / took:,.0f}", *shares])
    head = ["", "GPUs", "engine", "micro-batches x images", "memory a GPU, GB", "sent a GPU and step, GB", "ms a step", "images/s"]
    return _table([*head, "efficiency, %", "over 100 Gbit/s a node"], rows)


def _weak(found: dict[str, Shape], device: Device) -> str:
    rows = []
    for name, shape in found.items():
        for net, there in (("400 Gbit/s a GPU", device), ("100 Gbit/s a node", replace(device, network=ETHERNET))):
            times = []
            for ranks in RANKS:
                layout = estimate.Layout(ranks, WEAK, sharded=_sharded(shape, device, ranks))
                times.append(estimate.seconds(shape, layout, there))
            rows.append([name, net, f"{1000 * times[0]:.1f}", *(f"{100 * times[0] / t:.0f}" for t in times[1:])])
    return _table(["", "between nodes", "ms a step on 1 GPU", *(f"efficiency on {n:,}, %" for n in RANKS[1:])], rows)


def _engines(found: dict[str, Shape], device: Device) -> str:
    rows = []
    for name, shape in found.items():
        for sharded in (False, True):
            for again in RECOMPUTED:
                layout = estimate.Layout(64, WEAK, sharded=sharded, recompute=again)
                facts = [estimate.memory(shape, layout) / 1e9, estimate.traffic(shape, layout) / 1e9]
                took = 1000 * estimate.seconds(shape, layout, device)
                cells = [_engine(sharded, 64), RECOMPUTED[again], f"{facts[0]:.1f}", f"{facts[1]:.2f}", f"{took:.1f}"]
                rows.append([name, *cells])
    return _table(["", "engine", "recomputed", "memory a GPU, GB", "sent a GPU and step, GB", "ms a step"], rows)


def _sharded(shape: Shape, device: Device, ranks: int) -> bool:
    return ranks > 1 and estimate.state_bytes(shape.parameters, trained=shape.trained) > SHARE * device.memory


def _engine(sharded: bool, ranks: int) -> str:
    return "one process" if ranks == 1 else "FSDP" if sharded else "DDP"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(tables(), end="")
