"""Attentive probe: what a classifier reads from frozen patch tokens when it may choose where to look.

Chen et al., CAE, arXiv:2202.03026; El-Nouby et al., AIM, arXiv:2401.08541 (multi-head attention pooling behind a BatchNorm without
parameters, whose statistics are on fixed tokens simply those of the training images). Mean pooling undersells encoders that were not
trained to have a good mean token, such as masked autoencoders.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from mae.evaluation.features import TOKENS
from mae.evaluation.material import Result, draw_order, score
from mae.evaluation.subject import Subject
from mae.evaluation.tokens import Tokens
from mae.nets.attentive import AttentivePool

VERSION = 1
NEEDS_LABELS = True
OF_MODEL = True
READS = TOKENS


class Moments(NamedTuple):
    """Sums over tokens of some images."""

    number: int
    total: Tensor  # (D,) float64
    squares: Tensor  # (D,) float64

    def joined(self, other: "Moments") -> "Moments":
        """Those of both."""
        return Moments(self.number + other.number, self.total + other.total, self.squares + other.squares)

    def standardise(self, x: Tensor) -> Tensor:
        """(..., D) -> mean 0 and deviation 1 in every dimension; a dimension that does not vary is scaled to zero."""
        mean = self.total / self.number
        variance = self.squares / self.number - mean.square()
        varies = variance > 1e-10 * (mean.square() + variance)
        return (x - mean.float()) * torch.where(varies, variance.clamp(min=1e-30).rsqrt(), 0).float()


def evaluate(subject: Subject, *, learning_rates: list[float], weight_decay: float, epochs: int, batch_size: int, seed: int = 0) -> Result:
    """Accuracy on the test images. Classifiers of all learning rates are trained at once on the training images without augmentation;
    the rate is chosen on the validation images (a tenth of train where there are none), one more is trained on all of them, and reads the
    test images once.

    There are as many attention heads as the encoder has. Raises ConfigError for what has no tokens.
    """
    splits = subject.splits
    tokens = Tokens(subject, splits.train, splits.validation)
    training, validation = torch.arange(len(tokens)).split([len(splits.train), len(splits.validation)])
    if not len(validation):
        order = draw_order(len(tokens), seed, -2)
        validation, training = (ids.sort().values for ids in (order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]))
    classes = len(splits.train.classes or ())
    learn = partial(train, tokens, decay=weight_decay, epochs=epochs, batch_size=batch_size, classes=classes, seed=seed)
    of_training, of_validation = moments(tokens, training), moments(tokens, validation)

    found = merits(learn(training, of_training, learning_rates), tokens, validation, of_training)
    rate = learning_rates[max(range(len(found)), key=found.__getitem__)]
    every, of_all = torch.arange(len(tokens)), of_training.joined(of_validation)
    (classifier,) = learn(every, of_all, [rate])

    test, correct = Tokens(subject, splits.test_images), []
    with torch.no_grad():
        for x, y in test.batches(torch.arange(len(test)), 256):
            correct.append(classifier(of_all.standardise(x)).argmax(1) == y)
    right = torch.cat(correct).cpu()
    metrics = score(right, "mean") | {"n_test": len(right), "n_train": len(every)}
    return Result(metrics, {"learning_rate": rate}, correct={"accuracy": right.numpy()})


def moments(tokens: Tokens, ids: Tensor) -> Moments:
    """The moments of the tokens of some images."""
    found = Moments(0, *torch.zeros(2, tokens.width, dtype=torch.float64, device=tokens.subject.device))
    for x, _ in tokens.batches(ids, 256):
        flat = x.flatten(0, 1).double()
        found = found.joined(Moments(len(flat), flat.sum(0), flat.square().sum(0)))
    return found


def train(
    tokens: Tokens,
    ids: Tensor,
    standard: Moments,
    rates: Sequence[float],
    *,
    decay: float,
    epochs: int,
    batch_size: int,
    classes: int,
    seed: int,
) -> nn.ModuleList:
    """One classifier a learning rate, all from one start and in one order: AdamW, cosine to zero."""
    device, heads = tokens.subject.device, heads_of(tokens.subject)
    fresh = (AttentivePool(tokens.width, heads=heads, classes=classes, seed=seed) for _ in rates)
    classifiers = nn.ModuleList(fresh).to(device)
    groups = [
        group | {"peak": rate}
        for rate, classifier in zip(rates, classifiers, strict=True)
        for group in param_groups_weight_decay(classifier, decay)
    ]
    optimizer = torch.optim.AdamW(groups)
    steps, step = epochs * math.ceil(len(ids) / batch_size), 0
    for epoch in range(epochs):
        for x, y in tokens.batches(ids[draw_order(len(ids), seed, epoch)], batch_size):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            x = standard.standardise(x)
            # no classifier's gradient sees another's
            loss = sum((F.cross_entropy(classifier(x), y) for classifier in classifiers), torch.zeros((), device=device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return classifiers


@torch.no_grad()
def merits(classifiers: nn.ModuleList, tokens: Tokens, ids: Tensor, standard: Moments) -> list[tuple[bool, int, float]]:
    """What each classifier is chosen by, the larger the better: (finite?, images right, minus their cross-entropy)."""
    right, entropy = [0] * len(classifiers), [0.0] * len(classifiers)
    for x, y in tokens.batches(ids, 256):
        x = standard.standardise(x)
        for number, classifier in enumerate(classifiers):
            logits = classifier(x)
            right[number] += int((logits.argmax(1) == y).sum())
            entropy[number] += float(F.cross_entropy(logits.double(), y, reduction="sum"))
    return [(math.isfinite(e), r, -e) for r, e in zip(right, entropy, strict=True)]


def heads_of(subject: Subject) -> int:
    """The attention heads of the subject's encoder; one where it has none."""
    blocks = list(subject.model.encoder.blocks)
    return getattr(getattr(blocks[-1], "attn", None), "num_heads", 1) if blocks else 1
