"""What a forward pass reads of its own state before it writes it, kept for the backward pass.

torch.compile may compute a value anew in the backward pass instead of keeping it, also one that was read from a buffer which the forward
pass has overwritten since: gradients are then silently those of the new state (pytorch/pytorch, pull request 197039, not in torch 2.14).
What comes out of an operation that the compiler does not know it always keeps.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def snapshot(x: Tensor) -> Tensor:
    """x, with its gradient, as it is when this is called. Nothing but x itself where nothing is compiled."""
    return _copy(x) if torch.compiler.is_compiling() else x


@torch.library.custom_op("mae::snapshot", mutates_args=())
def _copy(x: Tensor) -> Tensor:
    return x.clone()


@_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
    return gradient


_copy.register_autograd(_backward)
