"""Reconstruction losses that several methods share: summed over a sample's dimensions, averaged over the batch.

That is the scale of a log-likelihood, at which a regulariser's weight means the same at any image size.
"""

from torch import Tensor
from torch.nn import functional as F


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of sum (prediction - target)^2, both (B, ...), in float32 at least."""
    return (_float(prediction) - _float(target)).square().flatten(1).sum(1).mean()


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the summed cross-entropy between targets (B, ...) in [0, 1] and the sigmoid of the logits."""
    return F.binary_cross_entropy_with_logits(_float(logits), _float(target), reduction="none").flatten(1).sum(1).mean()


def _float(x: Tensor) -> Tensor:
    return x.float() if x.itemsize < 4 else x
