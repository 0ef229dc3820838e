"""Dense transfer: a linear layer on frozen patch features says what every pixel belongs to, as in DINOv2, arXiv:2304.07193, section 7.4.

The layer learns the class that most pixels of a patch have; its logits are enlarged bilinearly to the mask's size. Intersection over
union (Everingham et al., IJCV 88, 2010) is that of all test pixels together. Settings are chosen on validation images.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mae.data import crops
from mae.data.sources import Source, Subset
from mae.errors import ConfigError
from mae.evaluation import canvas, drawing, linear_probe
from mae.evaluation.features import encodes_itself
from mae.evaluation.linear_probe import Heads
from mae.evaluation.material import Features, Result
from mae.evaluation.reconstruction import at_most
from mae.evaluation.subject import Subject
from mae.methods.base import Autoencoder

VERSION = 1
NEEDS_LABELS = False
OF_MODEL = True
UNSAID = 255  # a pixel of no class, which counts nowhere
SHOWN = 10  # images in the picture
PALETTE = np.array([[0.16, 0.16, 0.16], [0.90, 0.30, 0.25], [0.30, 0.75, 0.35], [0.30, 0.50, 0.95], [0.95, 0.80, 0.25]])


def evaluate(
    subject: Subject,
    *,
    learning_rates: list[float],
    weight_decays: list[float],
    epochs: int = 10,
    batch_size: int = 2048,
    train_images: int = 2000,
    test_images: int = 10_000,
    draws: int = 1000,
    seed: int = 0,
) -> Result:
    """Mean intersection over union and pixel accuracy in percent, with the half-width of the bootstrap's 95% interval over test images.

    'miou_constant' is what naming every pixel by the commonest class would give. Raises ConfigError for data without masks and for
    a model without patch features.
    """
    if getattr(subject.splits.train, "mask", None) is None:
        where = subject.config.data.path or subject.config.data.name
        raise ConfigError(f"{where} has no masks: put PNG files of class numbers into a folder masks/ beside data.path")
    if encodes_itself(subject.model) and type(subject.model).feature_maps is Autoencoder.feature_maps:
        raise ConfigError(f"{type(subject.model).__name__} has no patch features: take an encoder")
    splits = subject.splits
    train, held = at_most(splits.train, train_images), at_most(splits.validation, train_images)
    test = at_most(splits.test_images, test_images)
    masks = {name: _masks(source, subject) for name, source in (("train", train), ("held", held), ("test", test))}
    classes = max(int(m[m != UNSAID].max(initial=1)) for m in masks.values()) + 1

    learnt, choosing = (_patches(subject, source, masks[name]) for name, source in (("train", train), ("held", held)))
    grid = [(rate, decay) for rate in learning_rates for decay in weight_decays]
    learn = partial(linear_probe.train, epochs=epochs, batch_size=batch_size, classes=classes, seed=seed)
    choice = grid[linear_probe.choose(learn(learnt, grid), choosing)]
    both = Features(torch.cat([learnt.x, choosing.x]), torch.cat([learnt.y, choosing.y]))
    head = learn(both, [choice])

    said = np.concatenate(list(_predictions(subject, test, head)))
    confusion = np.stack([_confusion(*pair, classes) for pair in zip(masks["test"], said, strict=True)])  # (N, C, C)
    names = getattr(test, "mask_classes", None) or [str(c) for c in range(classes)]
    metrics = _scores(confusion, draws, seed, names)
    settings = {"learning_rate": choice[0], "weight_decay": choice[1]}
    return Result(
        metrics | {"n_test": len(test), "n_train": len(train) + len(held)},
        settings,
        {"examples": _picture(subject, test, masks["test"], said)},
    )


def majority(masks: Tensor, patch: tuple[int, int], classes: int) -> Tensor:
    """The class that most of a patch's pixels have, the lower one among equals: masks (N, H, W) -> (N, h, w); UNSAID where none has one."""
    count, height, width = masks.shape
    tiles = masks.view(count, height // patch[0], patch[0], width // patch[1], patch[1])
    best, most = torch.full((count, tiles.shape[1], tiles.shape[3]), UNSAID, device=masks.device), tiles.new_zeros(1).long()
    for c in range(classes):
        pixels = (tiles == c).sum((2, 4))
        best, most = torch.where(pixels > most, c, best), torch.maximum(pixels, most)
    return best


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """(..., C, C) counts of pixels, truth by prediction -> (..., C); NaN for a class that is neither there nor predicted."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def _scores(confusion: np.ndarray, draws: int, seed: int, names: list[str]) -> dict[str, float]:
    resampled = np.random.default_rng(seed).multinomial(len(confusion), np.full(len(confusion), 1 / len(confusion)), size=draws)
    total = confusion.sum(0)
    there = total.sum(1) > 0
    drawn = np.tensordot(resampled.astype(np.float64), confusion.astype(np.float64), 1)  # (draws, C, C)

    def miou(counts: np.ndarray) -> np.ndarray:
        return 100 * np.nanmean(intersection_over_union(counts)[..., there], axis=-1)

    def accuracy(counts: np.ndarray) -> np.ndarray:
        return 100 * np.trace(counts, axis1=-2, axis2=-1) / counts.sum((-2, -1))

    metrics: dict[str, float] = {}
    for name, score in (("miou", miou), ("pixel_accuracy", accuracy)):
        low, high = np.quantile(score(drawn), [0.025, 0.975])
        metrics |= {name: float(score(total)), f"{name}_ci95": float(high - low) / 2}
    metrics["miou_constant"] = float(100 * total.sum(1).max() / total.sum() / there.sum())
    each = 100 * intersection_over_union(total)
    return metrics | {f"iou_{name}": float(value) for name, value, seen in zip(names, each, there, strict=False) if seen}


def _masks(source: Source, subject: Subject) -> np.ndarray:
    """(N, H, W) uint8, cut as the images are."""
    size, factor = subject.config.image_size, subject.config.data.resize
    mask_of = getattr(source, "mask", None)
    assert mask_of is not None  # `evaluate` has asked for it
    read = (mask_of(i)[..., None] for i in range(len(source)))
    return np.stack([crops.central(mask, size, factor, crops.NEAREST)[..., 0] for mask in read])


def _maps(subject: Subject, source: Source) -> Iterator[Tensor]:
    """Patch features (B, h, w, D) float32."""
    for images, _ in subject.batches(source):
        with subject.reading():
            maps = subject.model.feature_maps(images)[-1]
        yield maps.float().permute(0, 2, 3, 1)


def _patches(subject: Subject, source: Source, masks: np.ndarray) -> Features:
    """The features and the majority class of every patch that has one."""
    maps = torch.cat(list(_maps(subject, source)))
    patch = masks.shape[1] // maps.shape[1], masks.shape[2] // maps.shape[2]
    classes = int(masks[masks != UNSAID].max(initial=0)) + 1
    labels = majority(torch.from_numpy(masks).to(maps.device), patch, classes)
    return Features(maps[labels != UNSAID], labels[labels != UNSAID].long())


def _predictions(subject: Subject, source: Source, head: Heads) -> Iterator[np.ndarray]:
    """The class of every pixel (B, H, W) uint8."""
    for maps in _maps(subject, source):
        logits = head.logits(maps.flatten(0, 2))[0].view(-1, *maps.shape[:3]).movedim(0, 1)  # (B, C, h, w)
        yield F.interpolate(logits, subject.config.image_size, mode="bilinear").argmax(1).to(torch.uint8).cpu().numpy()


def _confusion(truth: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    known = truth != UNSAID
    return np.bincount(truth[known].astype(np.int64) * classes + said[known], minlength=classes**2).reshape(classes, classes)


def _picture(subject: Subject, test: Source, truth: np.ndarray, said: np.ndarray) -> np.ndarray:
    """A few test images, their masks and what was said of them."""
    some = at_most(test, SHOWN)
    ids = some.positions if isinstance(some, Subset) and some is not test else slice(None)
    images = np.concatenate([canvas.colours(batch, subject.config) for batch, _ in subject.batches(some)])
    rows = [("image", images), ("truth", _colours(truth[ids])), ("prediction", _colours(said[ids]))]
    return drawing.image_rows(rows, caption=canvas.captioned("", subject.config))


def _colours(classes: np.ndarray) -> np.ndarray:
    """(N, H, W) -> (N, H, W, 3); what has no class is white."""
    more = np.random.default_rng(0).random((256 - len(PALETTE), 3))
    return np.where(classes[..., None] == UNSAID, 1.0, np.concatenate([PALETTE, more])[classes])
