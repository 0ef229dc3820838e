"""Linear probe on cached features: one linear layer on standardised features, every setting of a sweep trained at once.

He et al., arXiv:2111.06377, put BatchNorm(affine=False) before the layer; on fixed features its statistics are simply those of the
training set. The gradient of softmax cross-entropy is written out, so that a step is two matrix products for all heads together.
The sweep is scored on held-out training images, by cross-validation where these are few (Stone, 1974): a setting chosen on a hundred images
is a matter of luck. The winner is refitted on all training images, and the test images are read once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.evaluation.material import Features, Material, Result, accuracy_of, draw_order, score, standardiser
from mae.nets import keyed

VERSION = 2
NEEDS_LABELS = True
BETAS, EPSILON = (0.9, 0.999), 1e-8
FEW = 1000  # held-out images below which every training image is held out once


class Heads(NamedTuple):
    """H linear classifiers on features standardised alike."""

    weight: Tensor  # (H, C, D)
    bias: Tensor  # (H, C)
    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    def logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (H, C, B): images last, so that a softmax over classes runs over long rows of memory."""
        return _logits((x - self.mean) * self.scale, self.weight, self.bias)


def evaluate(
    material: Material,
    *,
    learning_rates: list[float],
    weight_decays: list[float],
    epochs: int,
    batch_size: int,
    folds: int = 5,
    held_out: float | None = None,
    train_first: int | None = None,
    test_first: int | None = None,
    best_on_test: bool = False,
    seed: int = 0,
) -> Result:
    """Accuracy on the test images for every pool, each with a learning rate and weight decay of its own choice.

    `held_out` is the share of the training images, drawn by the seed, that the choice is made on; None takes the validation
    images, or, where they are fewer than FEW and `folds` is above 1, every training image in its turn. `best_on_test` adds
    'accuracy_best_on_test': the best of the sweep by test accuracy, as some publish; it is no honest figure.
    """
    grid = [(rate, decay) for rate in learning_rates for decay in weight_decays]
    learn = partial(train, epochs=epochs, batch_size=batch_size, classes=material.class_count, seed=seed)
    judged = partial(cross_validated, epochs=epochs, batch_size=batch_size, classes=material.class_count, seed=seed)
    metrics: dict[str, float] = {}
    settings: dict[str, float] = {}
    right: dict[str, np.ndarray] = {}
    for pool in material.pools:
        training, validation = split(material, pool, seed, held_out=held_out, first=train_first)
        if held_out is None and folds > 1 and validation.sum() < FEW:
            found = judged(training, grid, folds)
        else:
            found = merits(learn(training.rows(~validation), grid), training.rows(validation))
        choice = best(found)

        test = material.testing(pool, test_first)
        kept = grid if best_on_test else [grid[choice]]
        correct = predict(learn(training, kept), test.x) == test.y[:, None]  # (N, H)
        chosen = correct[:, choice if best_on_test else 0]
        metrics |= score(chosen, pool)
        right[accuracy_of(pool)] = chosen.cpu().numpy()
        if best_on_test:
            metrics[f"{accuracy_of(pool)}_best_on_test"] = 100 * correct.double().mean(0).max().item()
        settings |= {f"learning_rate_{pool}": grid[choice][0], f"weight_decay_{pool}": grid[choice][1]}
    return Result(metrics | {"n_test": len(test.y), "n_train": len(training.y)}, settings, correct=right)


def train(
    data: Features,
    grid: list[tuple[float, float]],
    *,
    epochs: int,
    batch_size: int,
    classes: int,
    seed: int,
    unseen: Tensor | None = None,
) -> Heads:
    """One head for every (learning rate, weight decay) of the grid: AdamW, cosine to zero, all from one start and in one order.

    `unseen` (H, N) bool: what a head does not learn from.
    """
    device, (count, width) = data.x.device, data.x.shape
    mean, scale = standardiser(data.x)
    rates, decays = (torch.tensor(column, device=device)[:, None] for column in zip(*grid, strict=True))  # (H, 1)
    key = torch.from_numpy(keyed.hash_integers(seed, -1).reshape(1)).to(device)
    start = 0.01 * keyed.normal(key, width * classes, "noise").view(width, classes).T
    weight, bias = start.repeat(len(grid), 1, 1), torch.zeros(len(grid), classes, device=device)
    of_weight, of_bias = ((torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias))  # Adam's moments
    steps, step = epochs * math.ceil(count / batch_size), 0
    with _threads(batch_size * weight.numel()):
        for epoch in range(epochs):
            for ids in draw_order(count, seed, epoch, device=device).split(batch_size):
                step += 1
                rate = rates * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
                x = (data.x[ids] - mean) * scale
                error = _logits(x, weight, bias).softmax(1)  # (H, C, B)
                error[:, data.y[ids], torch.arange(len(ids), device=device)] -= 1
                if unseen is None:
                    error /= len(ids)
                else:
                    learns = (~unseen[:, ids])[:, None]  # (H, 1, B)
                    error *= learns / learns.sum(2, keepdim=True).clamp(min=1)
                _adamw(weight, (error.flatten(0, 1) @ x).view_as(weight), *of_weight, step, rate[..., None], decays[..., None])
                _adamw(bias, error.sum(2), *of_bias, step, rate, torch.zeros_like(decays))
    return Heads(weight, bias, mean, scale)


def cross_validated(
    data: Features, grid: list[tuple[float, float]], folds: int, *, epochs: int, batch_size: int, classes: int, seed: int
) -> list[tuple[bool, int, float]]:
    """`merits` of each setting over all images, each judged by a head that has not learnt from it; the heads of all folds train at once.

    The folds are drawn by the seed.
    """
    count, device = len(data.y), data.x.device
    fold = torch.empty(count, dtype=torch.int64, device=device)
    fold[draw_order(count, seed, -3, device=device)] = torch.arange(count, device=device) * folds // count
    of_head = torch.arange(folds, device=device).repeat_interleave(len(grid))
    unseen = fold == of_head[:, None]
    heads = train(data, grid * folds, unseen=unseen, epochs=epochs, batch_size=batch_size, classes=classes, seed=seed)
    found = []
    for number in range(folds):
        own = of_head == number
        some = Heads(heads.weight[own], heads.bias[own], heads.mean, heads.scale)
        found.append(merits(some, data.rows(fold == number)))
    return [(all(f for f, _, _ in m), sum(r for _, r, _ in m), sum(e for _, _, e in m)) for m in zip(*found, strict=True)]


def choose(heads: Heads, held_out: Features) -> int:
    """The head of highest accuracy on the held-out images; among equals the one of lowest cross-entropy."""
    return best(merits(heads, held_out))


def best(found: Sequence[tuple[bool, int, float]]) -> int:
    """Which of the `merits` is largest; the first of equals."""
    return max(range(len(found)), key=found.__getitem__)


def merits(heads: Heads, held_out: Features) -> list[tuple[bool, int, float]]:
    """What each head is chosen by, the larger the better: (finite?, how many held-out images are right, minus their cross-entropy)."""
    right = torch.zeros(len(heads.weight), dtype=torch.int64, device=heads.weight.device)
    entropy = torch.zeros(len(heads.weight), dtype=torch.float64, device=heads.weight.device)
    for x, y in zip(held_out.x.split(8192), held_out.y.split(8192), strict=True):
        logits = heads.logits(x)  # (H, C, B)
        right = right + (logits.argmax(1) == y).sum(1)
        entropy = entropy - logits.log_softmax(1)[:, y, torch.arange(len(y), device=y.device)].double().sum(1)
    return [(math.isfinite(e), r, -e) for r, e in zip(right.tolist(), entropy.tolist(), strict=True)]


def split(material: Material, pool: str, seed: int, *, held_out: float | None = None, first: int | None = None) -> tuple[Features, Tensor]:
    """All that may be learnt from, and a mask (N,) of what choices are made on: a share `held_out` drawn by the seed, or, for None, the
    validation images (a tenth where there are none).
    """
    training, validation = material.training(pool, first)
    if held_out is not None or not validation.any():
        validation = torch.zeros_like(validation)
        order = draw_order(len(validation), seed, -2, device=validation.device)
        validation[order[: max(1, round((held_out or 0.1) * len(validation)))]] = True
    return training, validation


def predict(heads: Heads, x: Tensor) -> Tensor:
    """The classes that each head gives: (N, D) -> (N, H) int64."""
    return torch.cat([heads.logits(some).argmax(1).T for some in x.split(8192)])


@contextmanager
def _threads(products: int) -> Iterator[None]:
    """One thread where a step has few products: to share those out takes longer than to do them, far longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if products < 2**24 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias.flatten()[:, None], weight.flatten(0, 1), x.T).view(*bias.shape, len(x))


def _adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: Tensor, decay: Tensor) -> None:
    """Loshchilov & Hutter, arXiv:1711.05101, with a rate and a decay for each head, (H, 1) or (H, 1, 1); all in place."""
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    root = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    parameter.mul_(1 - rate * decay)
    parameter.sub_(rate * first / (1 - BETAS[0] ** step) / root)
