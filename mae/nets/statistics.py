"""The one collective that methods may call: means over the global batch, with their gradient.

A loss that puts a batch mean through something non-linear (a logarithm, a divergence) is not the mean of the ranks' losses. Call it in
`forward` alone, which every rank runs: evaluation happens on rank 0.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def global_mean(x: Tensor) -> Tensor:
    """The mean over ranks of each rank's x (any shape, same on all), differentiable; x itself outside a process group."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Mean.apply(x)


class _Mean(torch.autograd.Function):
    """Backward averages too: gradients are then averaged over ranks once more, by data parallelism, as those of a large batch are."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return _averaged(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return _averaged(gradient)


def _averaged(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
