"""Training with labels on an encoder: the linear probe and the fine-tuning of the MAE paper, as jobs of the same loop."""

import functools
import time
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

import mae
from mae.commands import job
from mae.config import Config
from mae.data.augmentation import KeyedTransform, seeded
from mae.data.batch import Batch, normalise
from mae.data.loader import evaluation_batches
from mae.data.sources import Source, Splits
from mae.evaluation import results
from mae.methods.base import Output
from mae.nets.classifier import LinearProbe, finetuned
from mae.training.run import RunFolder
from mae.training.schedule import Plan
from mae.training.tracking import Tracker


def train_classifier(config: Config, folder: RunFolder, splits: Splits, plan: Plan, *, encoder: RunFolder) -> None:
    """Trains a classifier on the encoder of a run as `config.protocol` says and adds the test accuracy to both runs' results.

    Raises as job.run.
    """
    kind = config.protocol["name"].split("/")[0]
    classes = len(splits.train.classes or ())
    auto_augment = config.protocol.get("auto_augment", "none")
    transform = KeyedTransform(
        config.data,
        config.image_size,
        auto_augment=None if auto_augment == "none" else auto_augment,
        erase=config.protocol.get("erase", 0.0),
    )
    started = time.perf_counter()

    def finish(module: nn.Module, tracker: Tracker, device: torch.device, step: int) -> None:
        """Reads the test images, once, and notes the accuracy."""
        metrics = accuracy(module, splits.test, config, device)
        entry = results.trained_entry(config, splits, metrics, encoder=encoder.path.name, seconds=time.perf_counter() - started)
        for run in (folder, encoder):
            results.add_entries(run.results, [entry])
        tracker.log({"step": step, **{f"test/{k}": v for k, v in metrics.items()}})
        tracker.results([entry])
        print(f"\n{config.protocol['name']}: {metrics['accuracy']:.2f}% of {metrics['n_test']} test images")
        print(f"{folder.path}: results.json, metrics.jsonl")

    mixing = None
    if config.protocol.get("mixup") or config.protocol.get("cutmix"):
        mixing = Mixup(
            config.protocol["mixup"], config.protocol["cutmix"], label_smoothing=config.protocol["smoothing"], num_classes=classes
        )
    job.run(
        job.Job(
            kind=kind,
            name=encoder.path.name,
            build=functools.partial(_probe if kind == "linear_probe" else _classifier, config, encoder, classes),
            forward=functools.partial(_forward, config=config, mixing=mixing),
            held_out=lambda module, device: accuracy(module, splits.validation, config, device),
            finish=finish,
            transform=transform,
        ),
        config,
        folder,
        splits,
        plan,
    )


def _probe(config: Config, encoder: RunFolder, classes: int) -> nn.Module:
    return LinearProbe(mae.load(encoder.path).encoder, classes=classes, pool=config.protocol["pool"])


def _classifier(config: Config, encoder: RunFolder, classes: int) -> nn.Module:
    return finetuned(
        config.encoder.name,
        mae.load(encoder.path).encoder,
        image_size=config.image_size,
        classes=classes,
        drop_path=config.protocol["drop_path"],
        overrides=config.encoder.overrides,
    )


def _forward(module: nn.Module, batch: Batch, *, config: Config, mixing: Mixup | None) -> Output:
    """Cross-entropy of a batch. Mixing, dropout and drop path draw from generators seeded by the batch's own keys."""
    images, target = normalise(batch.images, config.data), batch.labels
    with seeded(int(batch.keys.sum())):
        if mixing is not None:
            images, target = mixing(images, target)
        logits = module(images).float()
    loss = F.cross_entropy(logits, target, label_smoothing=0.0 if mixing is not None else config.protocol.get("smoothing", 0.0))
    return Output(loss, {"accuracy": 100 * (logits.detach().argmax(1) == batch.labels).float().mean()})


@torch.no_grad()
def accuracy(module: nn.Module, source: Source, config: Config, device: torch.device) -> dict[str, Any]:
    """Share of a source's images that a classifier gets right, in percent, each image counted once."""
    right: Tensor = torch.zeros((), device=device)
    for batch in evaluation_batches(source, config, batch_size=256, device=device):
        right += (module(normalise(batch.images, config.data)).argmax(1) == batch.labels).sum()
    return {"accuracy": 100 * float(right) / len(source), "n_test": len(source)}
