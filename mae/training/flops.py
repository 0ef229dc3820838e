"""What a training step costs, counted, and what a device could do: floating-point operations of matrix products and attentions."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mae.methods.base import Output

BATCH = 8  # images that are counted together; a cost that does not grow with the batch is shared by them
MEASURING_SECONDS, LARGEST = 0.02, (2048, 8192)  # side of a matrix on a CPU, on a GPU


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
    """FLOPs a second of a large square matrix product: the best of a few, in some hundredths of a second."""
    best, side, started = 0.0, 256, time.perf_counter()
    while time.perf_counter() - started < MEASURING_SECONDS and side <= LARGEST[device.type == "cuda"]:
        matrix = torch.full((side, side), 1 / side, device=device, dtype=dtype)
        for _ in range(2):  # the first one may still load code
            _wait(device)
            began = time.perf_counter()
            matrix @ matrix
            _wait(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
        side *= 2
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
