"""What a training step costs, counted, and what a device could do: floating-point operations of matrix products and attentions."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mae.methods.base import Output
from mae.nets.products import wide_products

BATCH = 8  # images that are counted together; a cost that does not grow with the batch is shared by them
MEASURING_SECONDS, LARGEST = 0.1, (2048, 8192)  # side of a matrix on a CPU, on a GPU


def per_image(
    module: nn.Module,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Output],
    shape: tuple[int, int, int],
    *,
    device: torch.device | None = None,
) -> float:
    """FLOPs of a training step, not the first, for one image of shape (C, H, W), without the optimizer.

    Attention counts as its products, twice as many in the backward pass as in the forward pass: what fused kernels compute again is
    no work of the model, and before torch 2.15 the counter did not know the CPU's. Module and generators are left as they were.
    """
    module = copy.deepcopy(module).to(device).train()  # None: where it is
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False  # type: ignore[assignment]
    device = next(module.parameters()).device
    images = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    keys, counter = torch.arange(BATCH, device=device), FlopCounterMode(display=False)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with torch.no_grad():
            loss_of(module, images, keys)  # uncounted: a first step may do what no other does, such as to start a codebook
        with counter:
            loss_of(module, images, keys).loss.backward()
    return counter.get_total_flops() / BATCH


def of_device(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product: the best of many in a tenth of a second, so that no hiccup counts."""
    best, side, started = 0.0, 256, time.perf_counter()
    matrix = _matrix(side, device, dtype)
    with wide_products(device), torch.no_grad():
        while (left := MEASURING_SECONDS - (time.perf_counter() - started)) > 0:
            _wait(device)
            began = time.perf_counter()
            F.linear(matrix, matrix)
            _wait(device)
            took = time.perf_counter() - began
            best = max(best, 2 * side**3 / took)
            if 8 * took < left and side < LARGEST[device.type == "cuda"]:
                side *= 2
                matrix = _matrix(side, device, dtype)
    return best


def _matrix(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((side, side), 1 / side, device=device, dtype=dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
