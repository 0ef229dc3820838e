"""Features of an encoder that nobody trained: Gaussian clouds, one a class, for the tests of the evaluators."""

import torch

from mae.evaluation.material import Features, Material

CLASSES = 4


def clouds(count, width=6, noise=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    return Features(centres[y] + noise * torch.randn(count, width, generator=generator), y)


def material(train=None, test=None, validation=None):
    train, test = train or clouds(300), test or clouds(200, seed=2)
    validation = validation or train.rows(slice(0))
    positions = torch.arange(len(train.y) + len(validation.y))
    return Material({"mean": train}, {"mean": validation}, {"mean": test}, positions, tuple("abcd"))
