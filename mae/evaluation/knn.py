"""Weighted nearest neighbours on cosine similarity: Wu et al., arXiv:1805.01978; k = 20 and T = .07 as in DINO, arXiv:2104.14294.

The k nearest training images vote for their class with weight exp(similarity / T). Nothing is trained and nothing is chosen.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mae.evaluation.material import Features, Material, Result, accuracy_of, score

VERSION = 1
NEEDS_LABELS = True

# Similarities are compared in steps of 2^-20, so that rounding in a matrix product cannot decide between duplicates; among equals
# the earlier training image is nearer.
STEPS = 2**20


def evaluate(
    material: Material, *, k: int = 20, temperature: float = 0.07, train_first: int | None = None, test_first: int | None = None
) -> Result:
    """Accuracy on the test images, with all training and validation images as neighbours, for every pool."""
    metrics: dict[str, float] = {}
    correct: dict[str, np.ndarray] = {}
    for pool in material.pools:
        bank, _ = material.training(pool, train_first)
        test = material.testing(pool, test_first)
        predicted = predict(bank, test.x, k=k, temperature=temperature, classes=material.class_count)
        metrics |= score(predicted == test.y, pool)
        correct[accuracy_of(pool)] = (predicted == test.y).cpu().numpy()
    return Result(metrics | {"n_test": len(test.y), "n_train": len(bank.y)}, {}, correct=correct)


def predict(bank: Features, queries: Tensor, *, k: int, temperature: float, classes: int, block: tuple[int, int] = (512, 8192)) -> Tensor:
    """The class (Q,) int64 of each query (Q, D); equal votes go to the lower class. Memory is that of one block of (queries, bank)."""
    predicted = []
    for some in queries.split(block[0]):
        similarity, ids = neighbours(bank.x, some, k, block[1])
        weights = ((similarity - 1) / temperature).exp()  # - 1: the largest weight is 1, whatever the temperature
        votes = torch.zeros(len(some), classes, dtype=torch.float64, device=some.device)
        for weight, label in zip(weights.T, bank.y[ids].T, strict=True):  # one neighbour at a time: the sum's order is fixed on any device
            votes.scatter_add_(1, label[:, None], weight[:, None])
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def neighbours(bank: Tensor, queries: Tensor, k: int, block: int = 8192) -> tuple[Tensor, Tensor]:
    """The k (at most N) rows of bank (N, D) most similar to each of queries (Q, D), nearest first.

    Returns similarities float64 and ids int64, both (Q, k).
    """
    queries = F.normalize(queries.float(), dim=1)
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), block):
        some = F.normalize(bank[start : start + block].float(), dim=1)
        # one integer holds similarity and id, so that no two are equal: rounded similarity in the high bits, minus the id in the low
        ranks = (queries @ some.T).mul_(STEPS).round_().long().mul_(2**32)
        ranks -= torch.arange(start, start + len(some), device=bank.device)
        best = torch.cat([best, ranks], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    ids = (-best) % 2**32
    return ((best + ids) >> 32).double() / STEPS, ids
