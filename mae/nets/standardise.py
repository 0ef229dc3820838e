"""Batch normalisation of latents before they are coded, without gain and shift: as in Łańcucki et al., arXiv:2005.08520."""

import torch
from torch import Tensor, nn

from mae.nets.statistics import global_mean

MOMENTUM = 0.1  # of the running moments, a step


class Standardise(nn.Module):
    """Latents (B, N, w) with mean 0 and variance 1 in each of w numbers, over the global batch; in evaluation by running moments.

    Latents that drift or grow faster than their codes can follow, or to where a bounded number is flat, end in very few codes; tokens
    with a large mean in common are all explained by the same few atoms.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, N, w) -> the same shape, float32; in training the running moments follow."""
        if not self.training:
            return self.as_seen(latents)
        latents = latents.float()
        mean = global_mean(latents.mean((0, 1)))
        variance = global_mean((latents - mean).square().mean((0, 1)))
        rate = (1 / (self.batches + 1)).clamp(min=MOMENTUM)  # a plain mean over the first steps
        self.mean.lerp_(mean.detach(), rate)
        self.variance.lerp_(variance.detach(), rate)
        self.batches += 1
        return _standardised(latents, mean, variance)

    def as_seen(self, latents: Tensor) -> Tensor:
        """The same by the running moments, which stay as they are."""
        return _standardised(latents.float(), self.mean, self.variance)


def _standardised(latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (latents - mean) / (variance + 1e-5).sqrt()
