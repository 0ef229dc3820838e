"""Is it getting better? Figures on held-out images while a run goes on, for a small share of its time.

The images are few, so that the figures follow a run rather than measure an encoder: those of the end are the ones to report. The test
images are never looked at.
"""

import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mae.config import Config
from mae.data.sources import Source, Splits, Subset
from mae.evaluation import knn, spectrum
from mae.evaluation.diagnosis import diagnose
from mae.evaluation.features import extract
from mae.evaluation.material import Features, draw_order, standardiser
from mae.methods.base import Autoencoder

SHARE = 0.02  # of the training time that evaluation may take; promised are 3%
FEWEST, MOST = 64, 8192  # images looked at each time
RIDGE = 1.0  # penalty a standardised feature, in units of an image


class Online:
    """Measures a model again and again on the same images: as many, a power of two, as the first time was long enough for."""

    def __init__(self, splits: Splits, config: Config, *, images: int | None = None) -> None:
        """`images`: how many were looked at before the run was resumed."""
        self.splits, self.config, self.images, self.seconds = splits, config, images, 0.0

    def measure(self, model: Autoencoder, device: torch.device, *, interval: float, trained: float) -> dict[str, float]:
        """One row of figures. `interval`: seconds of training from one evaluation to the next, `trained` since the start.

        held_out/... are those of diagnosis.py; knn/accuracy, linear_probe/accuracy (ridge regression on the labels, in closed form) and
        rankme are those of `held_out/images` images, of which a quarter are held out and asked about. `held_out/share` is what all
        evaluations so far have cost of the training time.
        """
        start = time.perf_counter()
        if self.images is None:
            few, more = (self._seconds(model, device, count) for count in (FEWEST, 4 * FEWEST))
            an_image = max(more - few, 0.1 * more) / (3 * FEWEST)  # beyond what every look costs
            affordable = FEWEST + (SHARE * interval - few) / an_image
            self.images = min(max(1 << int(np.log2(max(affordable, 1))), FEWEST), MOST)
        figures = look(model, self.splits, self.config, device, self.images)
        self.seconds += time.perf_counter() - start
        return figures | {"held_out/images": self.images, "held_out/share": self.seconds / max(trained, 1e-9)}

    def _seconds(self, model: Autoencoder, device: torch.device, images: int) -> float:
        look(model, self.splits, self.config, device, images)  # the first time is no measure: memory is still to be found
        start = time.perf_counter()
        look(model, self.splits, self.config, device, images)
        return time.perf_counter() - start


def look(model: Autoencoder, splits: Splits, config: Config, device: torch.device, images: int) -> dict[str, float]:
    """All figures from so many images: a quarter held out, the rest training images, always the same ones."""
    asked = _some(splits.validation, max(images // 4, 1))
    found = {f"held_out/{k}": v for k, v in diagnose(model, splits, config, device=device, limit=len(asked)).figures.items()}
    queries = extract(model, asked, config, device=device, pools=("mean",))["mean"]
    found["rankme"] = spectrum.rankme(queries.x)
    if splits.train.labels is not None and splits.train.classes is not None:
        bank = extract(model, _some(splits.train, images - len(asked)), config, device=device, pools=("mean",))["mean"]
        classes = len(splits.train.classes)
        near = knn.predict(bank, queries.x, k=20, temperature=0.07, classes=classes)
        found["knn/accuracy"] = _percent(near == queries.y)
        found["linear_probe/accuracy"] = _percent(ridge(bank, queries.x, classes) == queries.y)
    return found


def ridge(data: Features, x: Tensor, classes: int) -> Tensor:
    """The classes (Q,) that a ridge regression on one-hot labels, fitted to standardised features (N, D), gives to rows (Q, D)."""
    mean, scale = standardiser(data.x)
    known, asked = ((part - mean).double() * scale for part in (data.x, x))
    target = F.one_hot(data.y, classes).double()
    centre = target.mean(0)
    gram = known.T @ known + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    return (asked @ torch.linalg.solve(gram, known.T @ (target - centre)) + centre).argmax(1)


def _some(source: Source, count: int) -> Source:
    """`count` images of a source, drawn once and for all, or all of them."""
    return source if len(source) <= count else Subset(source, draw_order(len(source), 1)[:count].sort().values.numpy())


def _percent(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()
