"""Training with labels on an encoder: the linear probe and the fine-tuning of the MAE paper, as jobs of the same loop."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mae.commands import closing, compare, job, predictions
from mae.commands.encoders import Found
from mae.config import Config
from mae.data.augmentation import KeyedTransform, seeded
from mae.data.batch import Batch, normalise
from mae.data.loader import evaluation_batches
from mae.data.sources import Source, Splits
from mae.errors import ConfigError
from mae.evaluation import results
from mae.evaluation.controls import Fixed, principal
from mae.evaluation.features import digest, pass_over
from mae.evaluation.material import Result, score
from mae.interop import timm_folder
from mae.interop.resize import resize
from mae.keys import Encoder, Evaluate, Track
from mae.methods.base import Autoencoder, Output
from mae.methods.build import build
from mae.nets.classifier import LinearProbe, check_blocks, finetuned, freeze_below
from mae.reporting import table
from mae.reporting.table import CONTROLS
from mae.training import distributed, lineage
from mae.training.run import RunFolder, decisive
from mae.training.schedule import Plan
from mae.training.tracking import Tracker

log = logging.getLogger("mae")


class _Subject(NamedTuple):
    """What a classifier is trained on top of, and where."""

    name: str  # in the entries of results.json
    config: Config
    folder: RunFolder
    build: Callable[[], nn.Module]
    reads: tuple[lineage.Artifact, ...] = ()  # for W&B


def train_classifier(config: Config, folder: RunFolder, splits: Splits, plan: Plan, *, encoder: Found) -> None:
    """Trains a classifier on an encoder as `config.protocol` says, and adds its test accuracy to both runs' results.

    The same training on the controls comes first, once per data and protocol; they are kept in `.cache/` beside the run.
    Raises as job.run.
    """
    if "blocks" in config.protocol:
        check_blocks(config.protocol["blocks"], len(_shape(config).encoder.blocks))  # before the controls are trained

    def trained() -> nn.Module:
        given = resize(Autoencoder(encoder.load().encoder), image_size=config.image_size, channels=config.data.channels)
        return _classifier(config, given, splits)

    own = _Subject(encoder.name, config, folder, trained, (lineage.encoder(encoder.name, encoder.home),))
    controls = _controls(config, splits, kept=encoder.home.path.parent / ".cache" / "controls") if config.evaluate.controls else []
    missing = [control for control in controls if control.folder.state() != "done"]
    if missing:
        names = ", ".join(CONTROLS[control.name] for control in missing)
        log.info(
            "first the same training on the controls (%s), once for this data and protocol: evaluate.controls=false leaves them out", names
        )

    def finish(entry: results.Entry, tracker: Tracker) -> None:
        """Beside the controls, to the files of both runs, W&B and the terminal."""
        beside = [(found, control.folder) for control in controls for found in json.loads(control.folder.results.read_text())]
        entries = [entry, *(found for found, _ in beside)]
        for run in (folder, encoder.home):
            for found, kept in [(entry, folder), *beside]:
                results.copy_correct(found, kept.path, run.path)
            results.add_entries(run.results, entries)
        compare.refresh(encoder.home.path)
        tracker.results(entries)
        made = ", classifier/ (timm)" if (folder.path / "classifier").exists() else ""
        print(f"\n{table.text(entries)}\n\n{folder.path}: results.json, metrics.jsonl{made}")

    with distributed.start(config.train.device, config.train.timeout):  # one group for all trainings
        for control in missing:
            log.info("\ncontrol: %s", CONTROLS[control.name])
            _train(control, splits, plan, lambda entry, tracker: None)
        _train(own, splits, plan, finish)


def _train(subject: _Subject, splits: Splits, plan: Plan, finish: Callable[[results.Entry, Tracker], None]) -> None:
    """One training in one folder, its test images read once at the end; `finish` is given the entry, on rank 0."""
    config, folder = subject.config, subject.folder
    protocol, started = config.protocol, time.perf_counter()

    def measure(module: nn.Module, tracker: Tracker, device: torch.device, step: int) -> None:
        """The entry of the trained classifier."""
        right = correct(module, splits.test_images, config, device)
        result = Result(score(right, "mean") | {"n_test": len(right)}, {}, correct={"accuracy": right.numpy()})
        seconds = time.perf_counter() - started
        entry = results.trained_entry(config, splits, result, encoder=subject.name, seconds=seconds, run_dir=folder.path)
        results.add_entries(folder.results, [entry])
        if isinstance(module, VisionTransformer) and subject.name not in CONTROLS:  # fine-tuned; of use without this project
            timm_folder.save(module, folder.path / "classifier", data=config.data, tag=folder.path.name, classes=splits.train.classes or ())
        tracker.log({"step": step, **{f"test/{k}": v for k, v in result.metrics.items()}})
        tracker.made(lineage.results(folder))
        predictions.send(tracker, splits, config, [entry], folder.path, lambda some: probabilities(module, some, config, device))
        finish(entry, tracker)

    mixing = None
    if protocol.get("mixup") or protocol.get("cutmix"):
        mixing = Mixup(
            protocol["mixup"], protocol["cutmix"], label_smoothing=protocol["smoothing"], num_classes=len(splits.train.classes or ())
        )
    auto_augment = protocol.get("auto_augment", "none")
    job.run(
        job.Job(
            kind=protocol["name"].split("/")[0],
            name=subject.name,
            reads=subject.reads,
            build=subject.build,
            loss=lambda module, images, keys: Output(module(images).float().mean(), {}),
            forward=functools.partial(_forward, config=config, mixing=mixing),
            held_out=lambda module, device, **_: {
                f"held_out/{k}": v for k, v in score(correct(module, splits.validation, config, device), "mean").items()
            },
            finish=measure,
            transform=KeyedTransform(
                config.data,
                config.image_size,
                auto_augment=None if auto_augment == "none" else auto_augment,
                erase=protocol.get("erase", 0.0),
            ),
        ),
        config,
        folder,
        splits,
        plan,
    )


def _controls(config: Config, splits: Splits, *, kept: Path) -> list[_Subject]:
    """The same training on what has learnt nothing: a linear classifier of raw pixels and of their principal components, and the
    encoder from fresh weights, always those of seed 0.
    """
    bare = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=0),
        evaluate=Evaluate(protocols=[], controls=False),
        track=Track(wandb="off"),
    )
    images, width = dataclasses.replace(bare, encoder=Encoder()), _shape(config).encoder.embed_dim

    def pixels() -> nn.Module:
        return _linear(Fixed(config), splits, pool="mean")

    def components() -> nn.Module:
        x = pass_over(splits.train, config, lambda images: {"mean": Fixed(config).encode(images)}, device=torch.device("cpu"))["mean"].x
        return _linear(Fixed(config).along(*principal(x, min(width, x.shape[1], len(x) - 1))), splits, pool="mean")

    def fresh() -> nn.Module:
        return _classifier(config, closing.untrained(config, torch.device("cpu")), splits)

    subjects = []
    for name, base, method, made in (
        ("control:pixels", images, {"name": "pixels"}, pixels),
        ("control:pca", images, {"name": "pca", "components": width}, components),
        ("control:untrained", bare, {"name": "untrained"}, fresh),
    ):
        own = dataclasses.replace(base, method=method)
        folder = kept / digest(decisive(own.as_dict()), results.data_name(own, splits))
        subjects.append(_Subject(name, own, RunFolder(folder), made))
    return subjects


def _shape(config: Config) -> Autoencoder:
    """The encoder without weights: its width, its blocks."""
    with torch.device("meta"):
        return build(dataclasses.replace(config, method={"name": "untrained"}))


def _classifier(config: Config, pretrained: Autoencoder, splits: Splits) -> nn.Module:
    """A linear layer on the frozen encoder, or the whole of it or its last blocks to be fine-tuned, as the protocol says."""
    encoder = pretrained.encoder
    if config.protocol["name"].startswith("linear_probe/"):
        return _linear(Autoencoder(encoder), splits, pool=config.protocol["pool"])
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"a {type(encoder).__name__} cannot be fine-tuned: take an encoder that is a timm vit_*")
    classifier = finetuned(
        config.encoder.name,
        encoder,
        image_size=config.image_size,
        classes=len(splits.train.classes or ()),
        drop_path=config.protocol["drop_path"],
        overrides=config.encoder.overrides,
    )
    if "blocks" in config.protocol:
        freeze_below(classifier, config.protocol["blocks"])
    return classifier


def _linear(frozen: Autoencoder | Fixed, splits: Splits, *, pool: str) -> LinearProbe:
    width = frozen.width if isinstance(frozen, Fixed) else frozen.encoder.embed_dim
    return LinearProbe(frozen, width=width, classes=len(splits.train.classes or ()), pool=pool)


def _forward(module: nn.Module, batch: Batch, *, config: Config, mixing: Mixup | None) -> Output:
    """Cross-entropy of a batch. Mixing, dropout and drop path draw from generators seeded by the batch's own keys."""
    images, target = normalise(batch.images, config.data), batch.labels
    with seeded(batch.seed):
        if mixing is not None:
            images, target = mixing(images, target)
        logits = module(images).float()
    loss = F.cross_entropy(logits, target, label_smoothing=0.0 if mixing is not None else config.protocol.get("smoothing", 0.0))
    return Output(loss, {"accuracy": 100 * (logits.detach().argmax(1) == batch.labels).float().mean()})


@torch.no_grad()
def probabilities(module: nn.Module, source: Source, config: Config, device: torch.device) -> Tensor:
    """(N, classes) on the CPU: what a classifier says of each image of a source."""
    batches = evaluation_batches(source, config, batch_size=256, device=device)
    return torch.cat([module(normalise(batch.images, config.data)).float().softmax(1).cpu() for batch in batches])


@torch.no_grad()
def correct(module: nn.Module, source: Source, config: Config, device: torch.device) -> Tensor:
    """(N,) bool on the CPU: whether a classifier gets each image of a source right."""
    batches = evaluation_batches(source, config, batch_size=256, device=device)
    return torch.cat([module(normalise(batch.images, config.data)).argmax(1) == batch.labels for batch in batches]).cpu()
