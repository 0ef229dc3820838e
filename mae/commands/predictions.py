"""A few test images as a table for W&B: what they show, and what each protocol made of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae.config import Config
from mae.data.batch import finished, normalise
from mae.data.crops import central
from mae.data.decode import DamagedImage
from mae.data.sources import Source, Splits, Subset
from mae.evaluation import canvas
from mae.evaluation.material import draw_order
from mae.evaluation.results import Entry
from mae.training.tracking import Tracker

SHOWN = 48  # test images


def send(
    tracker: Tracker,
    splits: Splits,
    config: Config,
    entries: Sequence[Entry],
    run_dir: Path,
    probabilities: Callable[[Source], Tensor] | None = None,
) -> None:
    """One row a test image, always the same ones: image, name, class; `right by PROTOCOL` of every entry of the encoder itself, true or
    false, or how often; with `probabilities` of images (N, classes), what was predicted and how surely.
    """
    test = splits.test
    if not tracker.on or test is None or test.labels is None or test.classes is None:
        return
    chosen = np.sort(draw_order(len(test), 0)[:SHOWN].numpy())
    columns: dict[str, Sequence[Any]] = {
        "image": [shown(test, int(i), config) for i in chosen],
        "name": [test.name_of(int(i)) for i in chosen],
        "class": [test.classes[test.labels[i]] for i in chosen],
    }
    if probabilities is not None:
        surest = probabilities(Subset(test, chosen)).max(1)
        columns["predicted"] = [test.classes[i] for i in surest.indices.tolist()]
        columns["probability"] = surest.values.tolist()
    for entry in entries:
        if "correct" in entry and not entry["encoder"]["name"].startswith("control:"):
            with np.load(run_dir / entry["correct"]) as kept:
                right = {f"right by {entry['protocol']}/{name}": x for name, x in kept.items() if len(x) == len(test)}
            columns |= {name: x[chosen].tolist() for name, x in right.items()}
    tracker.table("predictions", list(columns), list(zip(*columns.values(), strict=True)))


def shown(source: Source, index: int, config: Config) -> Any:
    """The image as an encoder sees it, (H, W, 3) uint8, its colours those of all pictures; or what is wrong with it."""
    try:
        image = central(source.read(index), config.image_size, config.data.resize)
    except DamagedImage as error:
        return str(error)
    pixels = finished(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], config.data)
    return np.rint(255 * canvas.colours(normalise(pixels, config.data), config)[0]).astype(np.uint8)
