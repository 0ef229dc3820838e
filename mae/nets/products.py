"""Linear layers in float32 on a CPU by the library that fills the processor's units.

torch multiplies float32 matrices by MKL, which on any processor but Intel's stays at instructions of 256 bits. AMD's compute on 512 bits
at a time since Zen 5, and oneDNN, which torch brings along too and takes for bf16, does so in float32 as well: 2.2 times as fast there
(docs/speed.md). Zen 4 has the instructions on units half as wide, where MKL leaves nothing to gain.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FULL_WIDTH = 26  # the family of AMD's processors that first had units of 512 bits: Zen 5
LEAST = 1 << 22  # multiplications in a product: a smaller one is over before oneDNN's call is set up
MANY_ROWS = 1024  # where a weight's gradient gains more by a better shape than it loses by being copied into place
_entered = ContextVar("_entered", default=False)


@contextlib.contextmanager
def wide_products(device: torch.device) -> Iterator[None]:
    """While entered, this thread's linear layers in float32, with their backward passes, are computed at the processor's full width
    where torch alone would not: to the same values but for rounding. What torch.compile has made stays as it is.

    `torch.backends.mkldnn.flags(enabled=False)` leaves everything to torch.
    """
    if not (device.type == "cpu" and _left_idle()):
        yield
        return
    before = _entered.set(True)
    try:
        with _Wide():
            yield
    finally:
        _entered.reset(before)


def again() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """For torch's checkpoint: what the passes of a block are to run in, the first one, which runs now, and its repetition."""
    return contextlib.nullcontext(), _Wide() if _entered.get() else contextlib.nullcontext()


def _left_idle() -> bool:
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return both and bool(torch.backends.mkldnn.enabled) and _wide_here()


@lru_cache(maxsize=1)
def _wide_here() -> bool:
    with contextlib.suppress(OSError):  # not Linux
        return is_wide_amd(Path("/proc/cpuinfo").read_text())
    return False


def is_wide_amd(told: str) -> bool:
    """Whether /proc/cpuinfo tells of an AMD processor with units of 512 bits. It is not measured, so that a run that is resumed computes
    as before.
    """
    family = re.search(r"^cpu family\s*: (\d+)$", told, re.MULTILINE)
    return "AuthenticAMD" in told and " avx512f " in told and family is not None and int(family[1]) >= FULL_WIDTH


class _Wide(TorchFunctionMode):
    """Takes the linear layers out of everything that torch is asked for."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and not torch.compiler.is_compiling() and _fits(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return function(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter)  # nothing sharded or otherwise of its own kind
    single = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and single and x.ndim > 1 and x.numel() * len(weight) >= LEAST


class _Linear(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out,) or None -> (..., out). Its gradients are made of it, so that they have gradients again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's values, by oneDNN."""
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of what `forward` was given, None where none is asked for."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, gradients = x.flatten(0, -2), gradient.flatten(0, -2)
        return (
            _Linear.apply(gradient, weight.t(), None) if for_x else None,
            _weight_gradient(rows, gradients) if for_weight else None,
            gradients.sum(0) if for_bias else None,
        )


def _weight_gradient(rows: Tensor, gradients: Tensor) -> Tensor:
    """(n, in), (n, out) -> (out, in), with the narrower of the two as the rows of the product: oneDNN is faster so."""
    if len(rows) >= MANY_ROWS and gradients.shape[1] > rows.shape[1]:
        return _Linear.apply(rows.t(), gradients.t(), None).t()
    return _Linear.apply(gradients.t(), rows.t(), None)
