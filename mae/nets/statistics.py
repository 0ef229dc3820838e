"""The collectives that methods may call: means over the global batch, with their gradient, and a gathering of its rows.

A loss that puts a batch mean through something non-linear (a logarithm, a divergence) is not the mean of the ranks' losses. Call it in
`forward` alone, which every rank runs: evaluation happens on rank 0.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


def global_mean(x: Tensor) -> Tensor:
    """The mean over ranks of each rank's x (any shape, same on all), differentiable; x itself outside a process group."""
    return x if ranks() == 1 else _Mean.apply(x)


def global_rows(x: Tensor) -> Tensor:
    """The rows of all ranks' x (n, ...), n the same on all, one rank after the other: (ranks * n, ...), without gradient."""
    if ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Mean(torch.autograd.Function):
    """Backward averages too: gradients are then averaged over ranks once more, by data parallelism, as those of a large batch are."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _averaged(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _averaged(gradient)


def _averaged(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
