"""Few labels: logistic regression on a handful of labelled images a class, repeated over draws of which ones are labelled.

Or on a share of the labels, 1% and 10% by custom since Henaff et al., arXiv:1905.09272, and SimCLR, arXiv:2002.05709, who draw once.
"""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import Tensor

from mae.errors import ConfigError
from mae.evaluation.material import Features, Material, Result, accuracy_of, draw_order, standardiser

VERSION = 1
NEEDS_LABELS = True


def evaluate(material: Material, *, shots: int = 5, share: float | None = None, draws: int = 10, c: float = 1.0, seed: int = 0) -> Result:
    """Mean and standard deviation over draws of the accuracy on all test images, for every pool.

    The labelled images are drawn from train and validation by the seed, the same for every encoder: `shots` of every class, or, where
    it is given, the `share` of every class, rounded and at least one. Features are standardised by all training images, which needs no
    label. `c` is the inverse strength of the L2 penalty: on digits (pixels, PCA; read on validation) any from 0.1 to 100 gives the same
    within a point. Raises ConfigError where a class has too few images.
    """
    metrics: dict[str, float] = {}
    correct: dict[str, np.ndarray] = {}
    for pool in material.pools:
        training, _ = material.training(pool)
        mean, scale = standardiser(training.x)
        test = material.testing(pool)
        x, x_test = (((f.x - mean) * scale).cpu().numpy() for f in (training, test))
        right = []
        for number in range(draws):
            ids = draw(training.y.cpu(), shots if share is None else share, seed, number, classes=material.classes).numpy()
            predicted = _fit(Features(x[ids], training.y.cpu().numpy()[ids]), c).predict(x_test)
            right.append(predicted == test.y.cpu().numpy())
        accuracies, name = [100 * float(np.mean(images)) for images in right], accuracy_of(pool)
        correct[name] = np.stack(right).mean(0, dtype=np.float32)
        metrics |= {name: float(np.mean(accuracies)), f"{name}_std": float(np.std(accuracies, ddof=min(1, draws - 1)))}
    return Result(metrics | {"draws": draws, "n_test": len(test.y), "n_train": len(ids)}, {}, correct=correct)


def draw(labels: Tensor, amount: int | float, seed: int, number: int, *, classes: tuple[str, ...] | None = None) -> Tensor:
    """Ids (M,) of the images that are labelled in that draw, of every class that occurs: exactly `amount`, an int, or that share of it, a
    float, rounded and at least one. Raises ConfigError where a class has too few images.
    """
    order = draw_order(len(labels), seed, number)
    chosen = []
    for label in labels.unique().tolist():
        of_class = order[labels[order] == label]
        shots = amount if isinstance(amount, int) else max(1, round(amount * len(of_class)))
        if len(of_class) < shots:
            name = classes[label] if classes else label
            raise ConfigError(f"class {name} has {len(of_class)} training images, fewer than protocol.shots={shots}: lower protocol.shots")
        chosen.append(of_class[:shots])
    return torch.cat(chosen)


def _fit(data: Features, c: float) -> LogisticRegression:
    few = len(data.x) < 1000  # threads then cost ten times what they save
    with warnings.catch_warnings(), threadpool_limits(1 if few else None):
        warnings.simplefilter("ignore", ConvergenceWarning)  # separable data: further steps only lengthen the weights
        return LogisticRegression(C=c, max_iter=1000).fit(data.x, data.y)
