"""Crops resized by the filter of Pillow's antialiased bicubic: one image, or a whole batch as two batched matrix products.

A resized crop is linear in the pixels and separable, rows @ image @ columns, so a batch of different crops needs no loop
(grid_sample has no antialiasing). The weights are those of Pillow's Resample.c: bicubic a = -0.5 whose support grows with
the reduction, cut at the crop's edge. Pillow also rounds between the two passes, so single pixels may differ by a level.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.data.batch import to_device


def crop_one(image: np.ndarray, box: np.ndarray, flip: bool, size: tuple[int, int]) -> Tensor:
    """Crops, resizes and mirrors one image (H, W, C) uint8 of its own size -> (C, h, w) uint8.

    `box` (4,) int64: top, left, height, width in pixels. By torch's uint8 kernel, which has Pillow's filter at a third of its time.
    """
    top, left, height, width = box.tolist()
    pixels = torch.from_numpy(np.array(image[top : top + height, left : left + width])).permute(2, 0, 1)[
        None
    ]  # a copy: Pillow's is read-only
    if (height, width) != size:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return (pixels.flip(3) if flip else pixels)[0]


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
    position = first + torch.arange(taps, device=device)  # (B, target, taps)
    weights = _bicubic((position + 0.5 - centre).div_(stretch)).mul_(position < length)
    weights /= weights.sum(dim=2, keepdim=True)
    into = (position + start).clamp_(max=source - 1).long()  # a tap outside the crop has no weight, it only needs a place
    return torch.zeros(len(starts), target, source, device=device).scatter_add_(2, into, weights)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 and support [-2, 2]; its two pieces meet in one formula without branches."""
    x = x.abs_().clamp_(max=2)
    inner = (1 - x).clamp_(min=0)
    far = (1 - x).mul_(0.5).mul_((2 - x).square_())
    return far.add_(inner.square().mul_(1 - 2 * inner))
