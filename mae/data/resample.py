"""Per-sample crops of a whole batch as two batched matrix products: Pillow's antialiased bicubic, sample by sample.

A resized crop is linear in the pixels and separable, rows @ image @ columns, so a batch of different crops needs no loop
(grid_sample has no antialiasing). The weights are those of Pillow's Resample.c: bicubic a = -0.5 whose support grows with
the reduction, cut at the crop's edge. Pillow also rounds between the two passes, so single pixels may differ by a level.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mae.data.batch import to_device


def crop_batch(images: Tensor, boxes: np.ndarray, flips: np.ndarray | None, size: tuple[int, int]) -> Tensor:
    """Crops, resizes and mirrors: images (B, C, H, W) uint8 -> (B, C, h, w) uint8 on their device.

    `boxes` (B, 4) int64: top, left, height, width in pixels; `flips` (B,) bool or None; `size` (h, w).
    """
    batch, channels, tall, wide = images.shape
    height, width = size
    rows = matrices(boxes[:, 0], boxes[:, 2], tall, height, device=images.device)  # (B, h, H)
    columns = matrices(boxes[:, 1], boxes[:, 3], wide, width, flips=flips, device=images.device)  # (B, w, W)
    pixels = images.reshape(batch, channels * tall, wide).float() @ columns.mT  # (B, C * H, w)
    pixels = rows.repeat_interleave(channels, dim=0) @ pixels.view(batch * channels, tall, width)  # (B * C, h, w)
    return pixels.add_(0.5).clamp_(0, 255).to(torch.uint8).view(batch, channels, height, width)  # the cast cuts: + 0.5 rounds


def matrices(
    starts: np.ndarray, lengths: np.ndarray, source: int, target: int, *, flips: np.ndarray | None = None, device: torch.device
) -> Tensor:
    """(B, target, source) float32: row j holds the weights of the source pixels in pixel j of the resized interval.

    Intervals [start, start + length) of `source` pixels, (B,) int64 each, become `target` pixels; flipped where `flips` (B,) says.
    """
    taps = math.ceil(4 * max(int(lengths.max()) / target, 1)) + 1
    start, length = (to_device(x.astype(np.float32), device)[:, None, None] for x in (starts, lengths))  # (B, 1, 1)
    scale = length / target
    stretch = scale.clamp(min=1)  # reducing widens the filter: antialiasing
    pixel = torch.arange(target, device=device)[:, None] + 0.5  # (target, 1)
    if flips is not None:
        pixel = torch.where(to_device(flips, device)[:, None, None], target - pixel, pixel)  # (B, target, 1)
    centre = pixel * scale
    first = (centre - 2 * stretch + 0.5).floor().clamp_(min=0)
    last = torch.minimum((centre + 2 * stretch + 0.5).floor(), length)
    position = first + torch.arange(taps, device=device)  # (B, target, taps)
    weights = _bicubic((position + 0.5 - centre) / stretch).mul_(position < last)
    weights /= weights.sum(dim=2, keepdim=True)
    into = (position + start).clamp_(max=source - 1).long()  # a tap outside the crop has no weight, it only needs a place
    return torch.zeros(len(starts), target, source, device=device).scatter_add_(2, into, weights)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, support [-2, 2]."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
