"""The best linear codes of pixels (PCA), and the best linear way back from a code to the pixels (ridge regression)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mae.evaluation.controls import principal


class Pairs(NamedTuple):
    """Codes (N, k) of images, and their pixels (N, D)."""

    codes: Tensor
    pixels: Tensor

    def chunks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time, in float64 on the device."""
        for codes, pixels in zip(self.codes.split(4096), self.pixels.split(4096), strict=True):
            yield codes.to(device).double(), pixels.to(device).double()


def pca_errors(train: Tensor, test: Tensor, components: int, device: torch.device) -> Tensor:
    """Squared errors (N,) of test pixels (N, D) from as many principal components of the training pixels (M, D)."""
    mean, directions = principal(train.to(device), components)
    errors = []
    for some in test.split(4096):
        x = some.to(device).double() - mean
        errors.append((x - x @ directions @ directions.T).square().sum(1).cpu())
    return torch.cat(errors)


def ridge_errors(train: Pairs, validation: Pairs, test: Pairs, strengths: Sequence[float], device: torch.device) -> tuple[Tensor, float]:
    """Squared errors (N,) of the test pixels from a ridge regression on the codes, and the strength that served best on validation.

    Codes are centred, and scaled by one number to variance 1 (a dimension that hardly varies stays small: it may be rounding); the
    penalty is strength * images * |weights|^2. Exact, from sums over the images.
    """
    mean = train.codes.mean(0, dtype=torch.float64).to(device)
    scale = (train.codes.to(device).double() - mean).square().mean().clamp(min=1e-30).rsqrt()
    offset = train.pixels.mean(0, dtype=torch.float64).to(device)
    products, targets = torch.zeros(()), torch.zeros(())
    for codes, pixels in train.chunks(device):
        z = (codes - mean) * scale
        products, targets = products + z.T @ z, targets + z.T @ (pixels - offset)
    values, vectors = torch.linalg.eigh(products / len(train.codes))
    rotated = vectors.T @ targets / len(train.codes)

    def errors(pairs: Pairs, strength: float) -> Tensor:
        weights = vectors @ (rotated / (values.clamp(min=0) + strength)[:, None])
        return torch.cat([(p - offset - (c - mean) @ weights * scale).square().sum(1).cpu() for c, p in pairs.chunks(device)])

    chosen = min(strengths, key=lambda strength: float(errors(validation, strength).mean())) if len(validation.codes) else strengths[0]
    return errors(test, chosen), chosen
