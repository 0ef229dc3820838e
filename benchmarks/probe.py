"""How much faster is a linear probe on features extracted once than the textbook's, which runs the encoder in every epoch?

    python benchmarks/probe.py [--encoder ENCODER] [--shards DIR] [--quick]

One side is ours: every image through the encoder once, then all learning rates as one batched problem. The other is the textbook's:
one learning rate after the other, the frozen encoder run on every batch of every epoch. Neither augments, both see the same images in
memory, in the same precision. The textbook's time is extrapolated from batches that are timed before, between and after our own work;
its accuracy is not: as the encoder is frozen and nothing is augmented, its batches are rows of the features, and its heads are
trained on them by plain PyTorch. Both choose the rate on the same held-out training images and read all test images once.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mae import config as configuration
from mae.commands import encoders
from mae.data.batch import normalise
from mae.data.loader import evaluation_batches
from mae.data.sources import Source, Subset, open_splits
from mae.evaluation import linear_probe
from mae.evaluation.features import evaluating
from mae.evaluation.material import Features, draw_order
from mae.methods.base import Autoencoder
from mae.methods.build import build
from mae.nets import precision as precisions
from mae.nets.vit import choose_attention

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 3e-1]
DECAY, BATCH = 1e-4, 1024
DRAWS = 3  # of the held-out images, the first weights and the order: which of several equal rates is chosen is luck
TIMED = 3  # textbook batches at each of the moments they are timed


def main() -> int:
    """Prints the comparison and, last, its figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", help="a run, checkpoint, timm:NAME (default: a ViT of width 192, depth 12, patch 4, untrained)")
    parser.add_argument("--shards", type=Path, help="CIFAR-10 as tar shards (default: images that are generated)")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="2,000 training images, a smaller encoder where none is given")
    options = parser.parse_args()
    device = torch.device(options.device)
    model, cfg = _encoder(options)
    kind = precisions.choose(cfg.train.precision, device)
    splits = open_splits(cfg.data)
    train, test = splits.train, splits.test
    if options.quick:
        train, test = Subset(train, draw_order(len(train), 0)[:2000].numpy()), Subset(test, draw_order(len(test), 0)[:2000].numpy())
    x, y = _images(train, cfg, device)
    x_test, y_test = _images(test, cfg, device)
    print(f"{len(y):,} training and {len(y_test):,} test images, {options.epochs} epochs, {len(RATES)} learning rates, {device}, {kind}")

    model.to(device)
    choose_attention(model, device)
    classes = len(train.classes)
    textbook = _Textbook(model, x, y, cfg, classes, kind)
    timed = textbook.seconds(TIMED)
    with _Clock(device) as extracting:
        features, features_test = (_features(model, part, cfg, kind) for part in (x, x_test))
    timed += textbook.seconds(TIMED)
    data = Features(features, y)
    ours, theirs, probing = [], [], None
    for draw in range(DRAWS):
        held_out = torch.zeros(len(y), dtype=torch.bool, device=device)
        held_out[draw_order(len(y), draw, device=device)[: len(y) // 10]] = True
        with _Clock(device) as clock:
            ours.append(_batched(data, held_out, features_test, options.epochs, classes, draw))
        probing = probing or clock
        theirs.append(_one_by_one(data, held_out, features_test, options.epochs, classes, draw))
    timed += textbook.seconds(TIMED)

    own, beside = ([100 * (predicted == y_test).double().mean().item() for predicted, _ in found] for found in (ours, theirs))
    accuracy, textbook_accuracy = statistics.mean(own), statistics.mean(beside)
    gap = abs(accuracy - textbook_accuracy)
    # what both do: a sweep on the images that are not held out, then one head on all; the test images once
    passes = options.epochs * (len(RATES) * (len(y) - len(y) // 10) + len(y)) + len(y_test)
    totals = [passes / BATCH * seconds for seconds in timed]
    seconds = extracting.seconds + probing.seconds
    ratios = sorted(total / seconds for total in totals)
    print(f"ours: {extracting.seconds:.1f} s for the features, {probing.seconds:.1f} s for all heads; {_told(own, ours)}")
    print(
        f"textbook: {statistics.median(timed):.3f} s a batch of {BATCH} ({len(timed)} timed), extrapolated to "
        f"{statistics.median(totals) / 3600:.1f} h; {_told(beside, theirs)}"
    )
    print(f"ratio {statistics.median(ratios):.0f} ({ratios[0]:.0f} to {ratios[-1]:.0f}); means of {DRAWS} draws {gap:.2f} points apart")
    figures = {
        "benchmark": "probe",
        "device": str(device),
        "ratio": round(statistics.median(ratios), 1),
        "ratio_low": round(ratios[0], 1),
        "ratio_high": round(ratios[-1], 1),
        "accuracy_gap": round(gap, 3),
        "accuracy": round(accuracy, 2),
        "textbook_accuracy": round(textbook_accuracy, 2),
        "n_test": len(y_test),
    }
    print(json.dumps(figures))
    return 0


class _Clock:
    """Seconds that a block takes, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> "_Clock":
        self.start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._now() - self.start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Textbook:
    """A step as textbooks take it: the frozen encoder, BatchNorm, one linear layer, cross-entropy, AdamW."""

    def __init__(self, model: Autoencoder, x: Tensor, y: Tensor, cfg: configuration.Config, classes: int, kind: str) -> None:
        self.model, self.x, self.y, self.cfg, self.kind = model, x, y, cfg, kind
        self.head = nn.Sequential(nn.BatchNorm1d(model.encoder.embed_dim, affine=False), nn.Linear(model.encoder.embed_dim, classes)).to(
            x.device
        )
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=1e-3, weight_decay=DECAY)
        self.step(0)

    def step(self, number: int) -> None:
        """One batch."""
        ids = torch.arange(number * BATCH, (number + 1) * BATCH, device=self.x.device) % len(self.x)
        loss = nn.functional.cross_entropy(self.head(_features(self.model, self.x[ids], self.cfg, self.kind)), self.y[ids])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def seconds(self, count: int) -> list[float]:
        """What each of so many steps takes."""
        taken = []
        for number in range(count):
            with _Clock(self.x.device) as clock:
                self.step(number)
            taken.append(clock.seconds)
        return taken


def _batched(data: Features, held_out: Tensor, x_test: Tensor, epochs: int, classes: int, seed: int) -> tuple[Tensor, float]:
    """All rates at once: the classes (N,) of the test images, and the rate that was chosen."""
    grid, how = [(rate, DECAY) for rate in RATES], {"epochs": epochs, "batch_size": BATCH, "classes": classes, "seed": seed}
    choice = linear_probe.choose(linear_probe.train(data.rows(~held_out), grid, **how), data.rows(held_out))
    return linear_probe.predict(linear_probe.train(data, [grid[choice]], **how), x_test)[:, 0], RATES[choice]


def _one_by_one(data: Features, held_out: Tensor, x_test: Tensor, epochs: int, classes: int, seed: int) -> tuple[Tensor, float]:
    """The same with a head a rate in plain PyTorch."""
    known, asked = data.rows(~held_out), data.rows(held_out)
    scores = {rate: (_fit(known, rate, epochs, classes, seed)(asked.x).argmax(1) == asked.y).double().mean().item() for rate in RATES}
    best = max(RATES, key=lambda rate: scores[rate])
    return _fit(data, best, epochs, classes, seed)(x_test).argmax(1), best


def _fit(data: Features, rate: float, epochs: int, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    head = nn.Sequential(nn.BatchNorm1d(data.x.shape[1], affine=False), nn.Linear(data.x.shape[1], classes)).to(data.x.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(data.y) // BATCH))
    for _ in range(epochs):
        for ids in torch.randperm(len(data.y), device=data.x.device).split(BATCH):
            loss = nn.functional.cross_entropy(head(data.x[ids]), data.y[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def _told(accuracies: list[float], found: list[tuple[Tensor, float]]) -> str:
    return ", ".join(f"{a:.2f}% at rate {rate:g}" for a, (_, rate) in zip(accuracies, found, strict=True))


def _encoder(options: argparse.Namespace) -> tuple[Autoencoder, configuration.Config]:
    """The model to probe and the configuration of its images."""
    data = ["configs/data/cifar10.yaml", f"data.path={options.shards}"] if options.shards else ["configs/data/shapes.yaml"]
    words = [*data, "data.cache=ram", "data.validation=0.02"]
    if options.encoder:
        found = encoders.find(options.encoder)
        return found.load(), encoders.configure(words, found.base)
    width, depth = (64, 4) if options.quick else (192, 12)
    size = [f"encoder.embed_dim={width}", f"encoder.depth={depth}", f"encoder.num_heads={width // 32}", "encoder.patch_size=4"]
    cfg = configuration.load([*words, "configs/methods/untrained.yaml", *size])
    torch.manual_seed(0)
    return build(cfg).eval(), cfg


def _images(source: Source, cfg: configuration.Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) uint8 of a source and their labels (N,), on the device."""
    batches = list(evaluation_batches(source, cfg, batch_size=BATCH, device=torch.device("cpu")))
    return torch.cat([b.images for b in batches]).to(device), torch.cat([b.labels for b in batches]).to(device)


@torch.no_grad()
def _features(model: Autoencoder, images: Tensor, cfg: configuration.Config, kind: str) -> Tensor:
    """Mean-pooled features (N, D) float32 of images (N, C, H, W) uint8."""
    with evaluating(model), precisions.computing(kind, images.device):
        return torch.cat([model.encode(normalise(some, cfg.data)).float() for some in images.split(BATCH)])


if __name__ == "__main__":
    sys.exit(main())
