"""Anomaly detection: train on what is normal, rank what is not.

`normal: each` is the one-class protocol (Ruff et al., "Deep One-Class Classification", ICML 2018): each class in turn is normal and all
others are anomalies. `normal: good` is that of a folder of good and defective images (MVTec AD: Bergmann et al., CVPR 2019). No score
sees an anomaly before the test, and nothing is chosen.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.data.sources import Source, Subset
from mae.errors import ConfigError
from mae.evaluation import anomaly_maps, anomaly_masks, anomaly_pictures, anomaly_scores, canvas
from mae.evaluation.material import Result, draw_order
from mae.evaluation.subject import Subject

VERSION = 1
NEEDS_LABELS = False  # training images that are all good have none
OF_MODEL = True


class Task(NamedTuple):
    """One division into normal and not."""

    name: str  # of the class that is normal
    normal: Tensor  # (N_train + N_validation,) bool
    anomalous: np.ndarray  # (N_test,) bool


def evaluate(
    subject: Subject,
    *,
    normal: str = "each",
    scores: Sequence[str] = ("knn", "reconstruction", "residual"),
    neighbours: int = 2,
    components: int = 32,
    rounds: int = 2,
    top: float = 0.1,
    reference_images: int = 256,
    bank_patches: int = 10000,
    seed: int = 0,
) -> Result:
    """AUROC and average precision in percent, means over the tasks, of every score that the model can give; `auroc` is that of the first.

    configs/evaluation/anomaly_one_class.yaml explains the settings. Raises ConfigError where the images do not say which are normal,
    where the test images are all normal or all not, and where the model cannot give the first score.
    """
    material = subject.material
    train = torch.cat([material.train["mean"].x, material.validation["mean"].x])
    test = material.test["mean"].x
    tasks = _tasks(subject, normal)
    makers: dict[str, Callable[[], dict[str, list[Tensor]]]] = {
        "knn": lambda: {"knn": [anomaly_scores.nearest(train[t.normal], test, neighbours) for t in tasks]},
        "residual": lambda: {"residual": [anomaly_scores.residual(train[t.normal], test, components, seed=seed) for t in tasks]},
        "reconstruction": lambda: {"reconstruction": _errors(subject, tasks, reference_images, rounds, seed)},
        "patch_knn": lambda: {"patch_knn": _distances(subject, tasks, reference_images, bank_patches, seed)},
    }
    if not scores or not set(scores) <= set(makers):
        raise ConfigError(f"protocol.scores {list(scores)}: choose from {', '.join(makers)}")
    found: dict[str, list[Tensor]] = {}
    for name in scores:
        try:
            found |= makers[name]()
        except ConfigError:  # the model cannot; the figure by which all are compared must be there
            if name == scores[0]:
                raise
    maps = {name: of_tasks for name, of_tasks in found.items() if of_tasks[0].ndim == 2}  # (N_test, P) each
    for name, of_tasks in maps.items():
        found |= {name: [m.mean(1) for m in of_tasks], f"{name}_top": [anomaly_scores.top_mean(m, top) for m in of_tasks]}
    metrics = _metrics(tasks, found, scores[0])
    masks = anomaly_masks.of_test(subject) if normal != "each" else None
    pictures = {}
    for name, of_tasks in maps.items():
        enlarged = anomaly_maps.enlarged(of_tasks[0], subject)
        if masks is not None:
            metrics[f"pixel_auroc_{name}"] = anomaly_masks.pixel_auroc(enlarged, masks)
        pictures[name] = _picture(subject, tasks[0], name, enlarged, masks, rounds, seed)
    metrics |= {"n_test": len(test), "n_train": int(sum(t.normal.sum() for t in tasks)) / len(tasks), "n_tasks": len(tasks)}
    return Result(metrics, {}, pictures)


def _tasks(subject: Subject, normal: str) -> list[Task]:
    """The divisions that are measured: one for every class, or one for the class that is called so."""
    splits, material = subject.splits, subject.material
    names = splits.test_images.classes
    if names is None:
        raise ConfigError("the test images do not say which are normal: sort them into folders such as test/good, test/scratch")
    y = torch.cat([material.train["mean"].y, material.validation["mean"].y]).cpu()
    labels = material.test["mean"].y.cpu().numpy()
    if normal != "each" and normal not in names:
        raise ConfigError(f"protocol.normal {normal} is no class of the test images: choose one of {', '.join(names)}")
    if normal == "each" and splits.train.classes is None:
        raise ConfigError("the training images have no classes: use anomaly_folders.yaml where all of them are normal")
    tasks = []
    for label in range(len(names)) if normal == "each" else [names.index(normal)]:
        # without labels, all training images are of the one class that the folders told of (data/folder.py)
        task = Task(names[label], y == label if splits.train.classes else torch.ones_like(y, dtype=torch.bool), labels != label)
        if task.normal.sum() < 2 or task.anomalous.all() or not task.anomalous.any():
            raise ConfigError(f"class {task.name} needs 2 training images, a test image and a test image of another class: leave it out")
        tasks.append(task)
    return tasks


def _errors(subject: Subject, tasks: Sequence[Task], count: int, rounds: int, seed: int) -> list[Tensor]:
    """For each task the reconstruction errors of the test images, standardised per patch on normal ones: (N_test, P)."""
    some, where = _reference(subject, tasks, count, seed)
    normal, test = (anomaly_maps.reconstruction_error(subject, s, rounds=rounds, seed=seed) for s in (some, subject.splits.test_images))
    return [anomaly_scores.standardised(normal[w], test) for w in where]


def _distances(subject: Subject, tasks: Sequence[Task], count: int, bank: int, seed: int) -> list[Tensor]:
    """For each task the distance of each test patch to the nearest normal one, (N_test, P). PatchCore: Roth et al., arXiv:2106.08265,
    with a random share of the normal patches instead of its core set.
    """
    some, where = _reference(subject, tasks, count, seed)
    normal, test = (anomaly_maps.patch_features(subject, s) for s in (some, subject.splits.test_images))  # (N, P, D)
    maps = []
    for w in where:
        patches = normal[w].flatten(0, 1)
        kept = patches[draw_order(len(patches), seed)[:bank]].to(subject.device)
        maps.append(anomaly_scores.nearest(kept, test.flatten(0, 1).to(subject.device), 1).view(test.shape[:2]).cpu())
    return maps


def _reference(subject: Subject, tasks: Sequence[Task], count: int, seed: int) -> tuple[Source, list[Tensor]]:
    """At most `count` normal training images a task, as one source, and where each task's stand in it."""
    length = len(subject.splits.train)
    order = draw_order(length, seed)
    chosen = [order[t.normal[:length][order]][:count] for t in tasks]
    ids = torch.cat(chosen).unique()  # sorted
    return Subset(subject.splits.train, ids.numpy()), [torch.searchsorted(ids, c.sort().values) for c in chosen]


def _metrics(tasks: Sequence[Task], found: dict[str, list[Tensor]], main: str) -> dict[str, float]:
    """Means over the tasks for every score, the main one's first and under plain names too, and its AUROC for each task."""
    metrics: dict[str, float] = {}
    for name in sorted(found, key=lambda name: name != main):
        rankings = [anomaly_scores.rank(s.cpu().numpy(), t.anomalous) for s, t in zip(found[name], tasks, strict=True)]
        own = {
            "auroc": float(np.mean([r.auroc for r in rankings])),
            "auroc_ci95": anomaly_scores.half_width([r.influence for r in rankings]),
            "average_precision": float(np.mean([r.average_precision for r in rankings])),
        }
        if name == main:
            share = 100 * float(np.mean([t.anomalous.mean() for t in tasks]))  # chance for the average precision
            metrics |= own | {"anomalies": share}
            metrics |= {f"auroc/{t.name}": r.auroc for t, r in zip(tasks, rankings, strict=True) if len(tasks) > 1}
        metrics |= {
            f"auroc_{name}": own["auroc"],
            f"auroc_{name}_ci95": own["auroc_ci95"],
            f"average_precision_{name}": own["average_precision"],
        }
    return metrics


def _picture(subject: Subject, task: Task, name: str, maps: Tensor, masks: np.ndarray | None, rounds: int, seed: int) -> np.ndarray:
    """Heat maps (N_test, H, W) over a few test images, beside what the model made of them where the maps are of its errors."""
    labels = subject.material.test["mean"].y.cpu().numpy()
    ids = anomaly_pictures.choose(labels, task.anomalous, seed)
    images = anomaly_pictures.images_of(subject, ids)
    classes = subject.splits.test_images.classes or ()  # `_tasks` asks for them
    rows = {"image": canvas.colours(images, subject.config)}
    if name == "reconstruction":
        made = anomaly_maps.reconstructed(subject, images, rounds=rounds, seed=seed)
        rows["reconstruction"] = canvas.colours(made, subject.config)
    return anomaly_pictures.draw(
        rows,
        maps[ids],
        titles=[f"{'' if task.anomalous[i] else 'normal: '}{classes[labels[i]]}" for i in ids],
        anomalous=task.anomalous[ids],
        limits=tuple(np.quantile(maps.cpu().numpy(), [0.5, 0.995])),
        masks=None if masks is None else masks[ids],
        caption=canvas.captioned("", subject.config),
    )
