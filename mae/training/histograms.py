"""Histograms of weights and gradients, counted on the device where these are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

BINS = 64
Histogram = tuple[np.ndarray, np.ndarray]  # counts (BINS,), edges (BINS + 1,)


def before_updates(
    optimizer: Optimizer, module: nn.Module, wanted: Callable[[], bool], send: Callable[[dict[str, Histogram]], None]
) -> None:
    """Sends the histograms of all weights and of their gradients just before an update, where they are `wanted`.

    Gradients are whole then, averaged over ranks and clipped; of a sharded weight the first rank's share is counted.
    """

    def look(*_: Any) -> None:
        if wanted():
            send(of_module(module))

    optimizer.register_step_pre_hook(look)


@torch.no_grad()
def of_module(module: nn.Module) -> dict[str, Histogram]:
    """`parameters/NAME` and, where there is one, `gradients/NAME` of every trainable parameter."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            for kind, x in (("parameters", parameter), ("gradients", parameter.grad)):
                if x is not None and x.numel():
                    found[f"{kind}/{name}"] = counted(x)
    return found


def counted(x: Tensor) -> Histogram:
    """BINS equal bins from the smallest to the largest value that is finite."""
    values = (x.to_local() if isinstance(x, DTensor) else x).detach().float().flatten()
    values = values[values.isfinite()]
    low, high = (float(v) for v in values.aminmax()) if len(values) else (0.0, 0.0)
    high = high if high > low else low + 1.0
    counts = torch.histc(values, BINS, low, high).cpu().numpy().astype(np.int64)
    return counts, np.linspace(low, high, BINS + 1)
