"""Crops resized by the filter of Pillow's antialiased bicubic: one image, or a whole batch as two batched matrix products.

A resized crop is linear in the pixels and separable, rows @ image @ columns, so a batch of different crops needs no loop
(grid_sample has no antialiasing). The weights are those of Pillow's Resample.c: bicubic a = -0.5 whose support grows with
the reduction, cut at the crop's edge. Pillow also rounds between the two passes, so single pixels may differ by a level.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae.data.batch import to_device

CPU_PIXELS = 3 << 17  # values that the CPU works on at once: what stays in its cache is faster
TABLE_WEIGHTS = 1 << 22  # 16 MB


def crop_one(image: np.ndarray, box: np.ndarray, flip: bool, size: tuple[int, int]) -> Tensor:
    """Crops, resizes and mirrors one image (H, W, C) of its own size -> (C, h, w), uint8 or float32 as it is.

    `box` (4,) int64: top, left, height, width in pixels. By torch's uint8 kernel, which has Pillow's filter at a third of its time.
    """
    top, left, height, width = box.tolist()
    cut = np.array(image[top : top + height, left : left + width])  # a copy: decoded images are read-only
    return resized(torch.from_numpy(cut).permute(2, 0, 1), flip, size)


def resized(image: Tensor, flip: bool, size: tuple[int, int]) -> Tensor:
    """A crop (C, H, W) on any device, resized and mirrored: (C, h, w), uint8 or float32 as it is."""
    pixels = image[None]
    if pixels.shape[2:] != size:
        exact = pixels if pixels.device.type == "cpu" else pixels.float()  # only the CPU has a kernel for uint8
        pixels = F.interpolate(exact, size=size, mode="bicubic", antialias=True)
        if pixels.dtype != image.dtype:
            pixels = pixels.round_().clamp_(0, 255).to(image.dtype)
    return (pixels.flip(3) if flip else pixels)[0]


def crop_batch(
    images: Tensor, boxes: np.ndarray, flips: np.ndarray | None, size: tuple[int, int], affine: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Crops, resizes and mirrors: images (B, C, H, W) -> (B, C, h, w) on their device, uint8 or float32 as they are.

    `boxes` (B, 4) int64: top, left, height, width in pixels; `flips` (B,) bool or None; `size` (h, w). With `affine`, (factor, shift) of
    (C, 1, 1) each, the result is float32, factor * crop + shift, and of uint8 images rounded to levels before.
    In memory the rows of all channels lie side by side, (B, h, C, w): one product does for all of them. Images so laid are read fastest.
    """
    if flips is None:
        flips = np.zeros(len(boxes), bool)
    device, (count, channels, tall, wide), (height, width) = images.device, images.shape, size
    rows = matrices(boxes[:, 0], boxes[:, 2], np.zeros_like(flips), tall, height, device)  # (B, h, H)
    columns = matrices(boxes[:, 1], boxes[:, 3], flips, wide, width, device, across=True)  # (B, W, w)
    crops = torch.empty(count, height, channels, width, dtype=images.dtype if affine is None else torch.float32, device=device)
    if affine is not None:  # as long as a crop, since broadcasting over short rows is slow
        affine = (_everywhere(affine[0], height, width), _everywhere(affine[1], height, width))
    part = min(max(CPU_PIXELS // images[0].numel(), 1), count) if device.type == "cpu" else count
    whole, narrow = (torch.empty(part, tall, channels, across, device=device) for across in (wide, width))
    for some, above, beside, into in zip(*(x.split(part) for x in (images.transpose(1, 2), rows, columns, crops)), strict=True):
        _crop(some, above, beside, into, affine, (whole, narrow))
    return crops.transpose(1, 2)


def _everywhere(values: Tensor, height: int, width: int) -> Tensor:
    """(C, 1, 1) -> (h * C * w,)."""
    return values[:, 0].expand(height, -1, width).reshape(-1)


def _crop(
    images: Tensor, rows: Tensor, columns: Tensor, crops: Tensor, affine: tuple[Tensor, Tensor] | None, scratch: tuple[Tensor, Tensor]
) -> None:
    """Fills `crops` (B, h, C, w) from images (B, H, C, W); `scratch`: room for at least (B, H, C, W) and (B, H, C, w) float32."""
    pixels, narrow = (x[: len(images)] for x in scratch)
    torch.bmm(pixels.copy_(images).flatten(1, 2), columns, out=narrow.flatten(1, 2))
    if affine is None and images.dtype != torch.float32:
        result = torch.bmm(rows, narrow.flatten(2)).view_as(crops)
    else:
        torch.bmm(rows, narrow.flatten(2), out=crops.flatten(2))
        result = crops
    if not images.is_floating_point():
        result.round_().clamp_(0, 255)
    if affine is not None:
        crops.flatten(1).mul_(affine[0]).add_(affine[1])
    elif result is not crops:
        crops.copy_(result)


def matrices(
    starts: np.ndarray, lengths: np.ndarray, flips: np.ndarray, source: int, target: int, device: torch.device, *, across: bool = False
) -> Tensor:
    """(B, target, source) float32: row j holds the weights of the source pixels in pixel j of the resized interval.

    Intervals [start, start + length) of `source` pixels, (B,) int64 each, become `target` pixels; flipped where `flips` (B,) bool says.
    `across`: transposed, (B, source, target), contiguous, as a factor on the right is multiplied fastest.
    """
    intervals = source * (source + 1) // 2
    if 2 * intervals * source * target > TABLE_WEIGHTS:
        weights = _weights(starts, lengths, flips, source, target, device)
        return weights.mT.contiguous() if across else weights
    shorter = (lengths - 1) * (source + 1) - lengths * (lengths - 1) // 2  # intervals, which the table has by length and start
    return _table(source, target, device, across).index_select(0, to_device(flips * intervals + shorter + starts, device))


@lru_cache(maxsize=4)
def _table(source: int, target: int, device: torch.device, across: bool) -> Tensor:
    """The matrices of all intervals, plain and then flipped: for 32 pixels 4 MB, and no arithmetic is left to do in a step."""
    lengths = np.repeat(np.arange(1, source + 1), np.arange(source, 0, -1))
    starts = np.concatenate([np.arange(source + 1 - length) for length in range(1, source + 1)])
    flips = np.repeat([False, True], len(starts))
    weights = _weights(np.tile(starts, 2), np.tile(lengths, 2), flips, source, target, device)
    return weights.mT.contiguous() if across else weights


def _weights(starts: np.ndarray, lengths: np.ndarray, flips: np.ndarray, source: int, target: int, device: torch.device) -> Tensor:
    taps = math.ceil(4 * max(int(lengths.max()) / target, 1)) + 1
    start, length = (to_device(x.astype(np.float32), device)[:, None, None] for x in (starts, lengths))  # (B, 1, 1)
    scale = length / target
    stretch = scale.clamp(min=1)  # reducing widens the filter: antialiasing
    pixel = torch.arange(target, device=device)[:, None] + 0.5  # (target, 1)
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
