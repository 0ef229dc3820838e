"""Our side of a comparison of training steps: the program's own loop on batches that are handed to it."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peers import Size
from torch import Tensor

from mae import config as configuration
from mae.config import Config
from mae.data.batch import Batch, normalise
from mae.data.loader import train_batches
from mae.data.sources import open_splits
from mae.methods.build import build
from mae.nets.vit import choose_attention
from mae.training import blocks, loop, optim, parallel
from mae.training.distributed import Ranks
from mae.training.progress import Progress
from mae.training.schedule import Plan

QUIET = loop.Hooks(log=id, save=id, evaluate=id, picture=id, stop=lambda: False)
NEVER = 1 << 40  # steps
SECONDS = 2.0  # of a turn on real input


def words_of(size: Size, method: str, batch: int) -> list[str]:
    """The words that configure a model of that size."""
    encoder = dict(patch_size=size.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads, mlp_ratio=4)
    decoder = dict(decoder_width=size.decoder_width, decoder_depth=size.decoder_depth, decoder_heads=size.decoder_heads)
    return [
        "configs/data/shapes.yaml",
        f"configs/methods/{method}.yaml",
        "encoder.name=vit_tiny_patch16_224",
        *(f"encoder.{key}={value}" for key, value in encoder.items()),
        *(f"method.{key}={value}" for key, value in decoder.items()),
        "method.norm_pix=true",
        "optim.name=adamw",
        "optim.betas=[0.9,0.95]",
        "optim.weight_decay=0.05",
        f"data.image_size={size.image}",
        "data.channels=3",
        f"train.batch_size={batch}",
        f"train.log_every={NEVER}",
        f"train.checkpoint_every={NEVER}",
        "train.check_replicas=0",
    ]


class Ours:
    """A method under the training loop, exactly as `pretrain.py` sets it up, without files, figures and evaluation."""

    def __init__(self, size: Size, method: str, batch: int, device: torch.device, *, compiled: bool, words: tuple[str, ...] = ()) -> None:
        self.words = [*words_of(size, method, batch), f"train.compile={compiled}", *words]
        self.config: Config = configuration.load(self.words)
        self.ranks, self.progress, self.compiled = Ranks(0, 1, device), Progress(), compiled
        torch.manual_seed(0)
        self.method = build(self.config)
        blocks.recompute(self.method, self.config.train.recompute)
        self.spread = parallel.Spread("plain", self.method, self.ranks)
        self.optimizer = optim.create(self.method, self.config.optim)
        if compiled:
            self.spread.compile()

    def steps(self, batches: Iterator[list[Batch]], count: int, precision: str) -> None:
        """So many optimisation steps on the next batches."""
        choose_attention(self.method, self.ranks.device, precision=precision)
        loop.fit(
            self.spread.wrapped().train(),
            lambda module, batch: module(normalise(batch.images, self.config.data), keys=batch.keys),
            batches,
            optimizer=self.optimizer,
            average=None,
            scaler=torch.amp.GradScaler(self.ranks.device.type, enabled=precision == "fp16"),
            plan=self._plan(self.progress.step + count),
            progress=self.progress,
            config=self.config,
            precision=precision,
            ranks=self.ranks,
            hooks=QUIET,
        )

    def _plan(self, until: int) -> Plan:
        batch = self.config.train.batch_size
        return Plan(peak_lr=1e-5, min_lr=1e-5, warmup=0.0, steps=until, seconds=None, batch_size=batch, steps_per_epoch=1e3)


def synthetic(images: Tensor) -> Iterator[list[Batch]]:
    """The same images (B, C, H, W) again and again, under new keys, so that masks change."""
    keys = torch.arange(len(images), device=images.device)
    while True:
        keys = keys + len(images)
        yield [Batch(images, keys=keys, labels=keys, ids=keys, replaced=0, seed=0)]


def real_share(side: Ours, images: Tensor, shards: Path, words: list[str], precision: str, repeats: int) -> float:
    """The rate of steps on the images of shards over that on `images`, which lie on the device: the median over turns."""
    batch, device = side.config.train.batch_size, side.ranks.device
    common = [*side.words, "configs/data/shards.yaml", f"data.path={shards}", f"data.image_size={images.shape[-1]}"]
    cfg = configuration.load([*common, "data.validation=0.01", "data.crop_scale=[0.2,1]", "data.flip=true", *words])
    source = open_splits(cfg.data).train
    side.config = cfg  # the mean and deviation of these images
    with contextlib.closing(train_batches(source, cfg, first_step=0, device=device)) as real:
        streams = {"real": real, "synthetic": synthetic(images)}
        side.steps(real, 2, precision)  # the workers start
        count = max(round(SECONDS * _rate(side, streams["synthetic"], 2, precision) / batch), 2)
        print(f"  the loader alone: {_loaded(real, count, device) * batch:.4g} images/s", flush=True)
        shares = []
        for _ in range(repeats):
            rates = {name: _rate(side, stream, count, precision) for name, stream in streams.items()}
            shares.append(rates["real"] / rates["synthetic"])
    return round(statistics.median(shares), 3)


def _loaded(batches: Iterator[list[Batch]], count: int, device: torch.device) -> float:
    """Batches a second without a step."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    _wait(device)
    return count / (time.perf_counter() - began)


def _rate(side: Ours, stream: Iterator[list[Batch]], count: int, precision: str) -> float:
    _wait(side.ranks.device)
    began = time.perf_counter()
    side.steps(stream, count, precision)
    _wait(side.ranks.device)
    return count * side.config.train.batch_size / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
