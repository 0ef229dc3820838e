"""Crops resized by the filter of Pillow's antialiased bicubic: one image, or a whole batch without a loop over samples.

A resized crop is linear in the pixels and separable, rows @ image @ columns: the rows of a batch of different crops are weighted sums of
few lines each, the columns one batched matrix product (grid_sample has no antialiasing). The weights are those of Pillow's Resample.c:
bicubic a = -0.5 whose support grows with the reduction, cut at the crop's edge. Pillow also rounds between the two passes, so single
pixels may differ by a level.
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
    In memory the rows of all channels lie side by side, (B, h, C, w): one sum does for all of them. Images so laid are read fastest.
    """
    if flips is None:
        flips = np.zeros(len(boxes), bool)
    device, (count, channels, tall, wide), (height, width) = images.device, images.shape, size
    rows = taps(boxes[:, 0], boxes[:, 2], tall, height, device)  # (B, h, taps) twice
    columns = matrices(boxes[:, 1], boxes[:, 3], flips, wide, width, device)  # (B, W, w)
    crops = torch.empty(count, height, channels, width, dtype=images.dtype if affine is None else torch.float32, device=device)
    if affine is not None:  # as long as a crop, since broadcasting over short rows is slow
        affine = (_everywhere(affine[0], height, width), _everywhere(affine[1], height, width))
    part = min(max(CPU_PIXELS // images[0].numel(), 1), count) if device.type == "cpu" else count
    pixels = torch.empty(part, tall, channels, wide, device=device)
    parts = (x.split(part) for x in (images.transpose(1, 2), *rows, columns, crops))
    for some, places, weights, across, into in zip(*parts, strict=True):
        _crop(pixels[: len(some)].copy_(some), (places, weights), across, into, affine, levels=not images.is_floating_point())
    return crops.transpose(1, 2)


def _everywhere(values: Tensor, height: int, width: int) -> Tensor:
    """(C, 1, 1) -> (h * C * w,)."""
    return values[:, 0].expand(height, -1, width).reshape(-1)


def _crop(
    pixels: Tensor, rows: tuple[Tensor, Tensor], columns: Tensor, crops: Tensor, affine: tuple[Tensor, Tensor] | None, *, levels: bool
) -> None:
    """Fills `crops` (B, h, C, w) from float32 pixels (B, H, C, W), which are rounded to `levels` where these were such."""
    (count, tall), (height, channels) = pixels.shape[:2], crops.shape[1:3]
    narrow = _summed(pixels.view(count * tall, -1), *rows, tall).view(count, height * channels, -1)
    result = crops if crops.dtype == torch.float32 else torch.empty_like(crops, dtype=torch.float32)
    torch.bmm(narrow, columns, out=result.flatten(1, 2))
    if levels:
        result.round_().clamp_(0, 255)
    if affine is not None:
        result.flatten(1).mul_(affine[0]).add_(affine[1])
    if result is not crops:
        crops.copy_(result)


def _summed(lines: Tensor, places: Tensor, weights: Tensor, tall: int) -> Tensor:
    """Weighted sums of the lines (B * H, N) of each image, `places` and `weights` (B, h, taps) as of `taps`: (B * h, N).

    By the kernel for bags of embeddings: a filter reaches some five lines, of which a product with a matrix would take all.
    """
    images = torch.arange(0, len(lines), tall, dtype=torch.int32, device=lines.device)
    bags = torch.arange(0, places.numel(), places.shape[2], dtype=torch.int32, device=lines.device)
    return F.embedding_bag((places + images[:, None, None]).flatten(), lines, bags, mode="sum", per_sample_weights=weights.flatten())


def taps(starts: np.ndarray, lengths: np.ndarray, source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, target, taps) int32 and float32: which source pixels make pixel j of the resized interval, and with which weights.

    Intervals [start, start + length) of `source` pixels, (B,) int64 each, become `target` pixels.
    """
    intervals = source * (source + 1) // 2
    if intervals * target * _reach(source, target) > TABLE_WEIGHTS:
        return _taps(starts, lengths, np.zeros(len(starts), bool), source, target, device)
    places, weights = _table_of_taps(source, target, device)
    which = to_device(_interval(starts, lengths, source), device)
    return places.index_select(0, which), weights.index_select(0, which)


def matrices(starts: np.ndarray, lengths: np.ndarray, flips: np.ndarray, source: int, target: int, device: torch.device) -> Tensor:
    """(B, source, target) float32: column j holds the weights of the source pixels in pixel j of the resized interval.

    Intervals as for `taps`, flipped where `flips` (B,) bool says. Contiguous, as a factor on the right is multiplied fastest.
    """
    intervals = source * (source + 1) // 2
    if 2 * intervals * source * target > TABLE_WEIGHTS:
        return _matrices(starts, lengths, flips, source, target, device)
    return _table(source, target, device).index_select(0, to_device(flips * intervals + _interval(starts, lengths, source), device))


def _interval(starts: np.ndarray, lengths: np.ndarray, source: int) -> np.ndarray:
    """The place (B,) int64 of each interval in the tables, which have them by length and start."""
    return (lengths - 1) * (source + 1) - lengths * (lengths - 1) // 2 + starts


def _intervals(source: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of all intervals of `source` pixels, in the order of `_interval`."""
    starts = np.concatenate([np.arange(source + 1 - length) for length in range(1, source + 1)])
    return starts, np.repeat(np.arange(1, source + 1), np.arange(source, 0, -1))


@lru_cache(maxsize=4)
def _table_of_taps(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    starts, lengths = _intervals(source)
    return _taps(starts, lengths, np.zeros(len(starts), bool), source, target, device)


@lru_cache(maxsize=4)
def _table(source: int, target: int, device: torch.device) -> Tensor:
    """The matrices of all intervals, plain and then flipped: for 32 pixels 4 MB, and no arithmetic is left to do in a step."""
    starts, lengths = _intervals(source)
    return _matrices(np.tile(starts, 2), np.tile(lengths, 2), np.repeat([False, True], len(starts)), source, target, device)


def _matrices(starts: np.ndarray, lengths: np.ndarray, flips: np.ndarray, source: int, target: int, device: torch.device) -> Tensor:
    places, weights = _taps(starts, lengths, flips, source, target, device)
    rows = torch.zeros(len(starts), target, source, device=device).scatter_add_(2, places.long(), weights)
    return rows.mT.contiguous()


def _reach(length: int, target: int) -> int:
    """How many pixels the filter may touch where so many become `target`."""
    return math.ceil(4 * max(length / target, 1)) + 1


def _taps(
    starts: np.ndarray, lengths: np.ndarray, flips: np.ndarray, source: int, target: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    start, length = (to_device(x.astype(np.float32), device)[:, None, None] for x in (starts, lengths))  # (B, 1, 1)
    scale = length / target
    stretch = scale.clamp(min=1)  # reducing widens the filter: antialiasing
    pixel = torch.arange(target, device=device)[:, None] + 0.5  # (target, 1)
    pixel = torch.where(to_device(flips, device)[:, None, None], target - pixel, pixel)  # (B, target, 1)
    centre = pixel * scale
    first = (centre - 2 * stretch + 0.5).floor().clamp_(min=0)
    position = first + torch.arange(_reach(int(lengths.max()), target), device=device)  # (B, target, taps)
    weights = _bicubic((position + 0.5 - centre).div_(stretch)).mul_(position < length)
    weights /= weights.sum(dim=2, keepdim=True)
    return (position + start).clamp_(max=source - 1).int(), weights  # a tap outside the crop has no weight, it only needs a place


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 and support [-2, 2]; its two pieces meet in one formula without branches."""
    x = x.abs_().clamp_(max=2)
    inner = (1 - x).clamp_(min=0)
    far = (1 - x).mul_(0.5).mul_((2 - x).square_())
    return far.add_(inner.square().mul_(1 - 2 * inner))
