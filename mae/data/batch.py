"""What a step sees: uint8 images with the keys that decide their randomness; and their normalisation, done on the device.

Images of more than 8 bits a channel (data.name=arrays) are float32, and normalised where they are cropped.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.data.decode import DamagedImage
from mae.keys import Data

AT_ONCE = 1 << 18  # values that a CPU normalises at once, so that they stay in its cache


class Batch(NamedTuple):
    """Some samples of a source, on the device."""

    images: Tensor  # (B, C, H, W) uint8; float32, normalised, where a transform or a cache made them or a source has more than 8 bits
    keys: Tensor  # (B,) int64: a hash of (seed, epoch, id), which decides crop, flip, mask and noise
    labels: Tensor  # (B,) int64, of the images shown; -1 = none
    ids: Tensor  # (B,) int64: positions in the source
    replaced: int  # how many images were damaged and show another one instead
    seed: int  # the sum of the keys, for what draws from generators: known to the host, which need not wait for the device


class Samples(NamedTuple):
    """What a process that reads hands over for one step: few tensors, since each costs a file descriptor on its way."""

    images: Tensor  # (B, C, H, W)
    numbers: Tensor  # (3, B) int64 on the CPU: keys, labels, ids
    replaced: np.ndarray  # (B,) bool
    damage: list[DamagedImage]


def micro_batches(samples: Samples, parts: int, device: torch.device) -> list[Batch]:
    """The samples on the device, cut into equal contiguous parts."""
    images, numbers = (to_device(x, device) for x in (samples.images, samples.numbers))
    size = len(images) // parts
    cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
    batches = []
    for cut in cuts:
        keys, labels, ids = numbers[:, cut]
        replaced, seed = int(samples.replaced[cut].sum()), int(samples.numbers[0, cut].sum())
        batches.append(Batch(images[cut], keys, labels, ids, replaced, seed))
    return batches


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The values on the device; to a GPU through pinned memory, since a plain copy waits for all its work."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalise(images: Tensor, data: Data) -> Tensor:
    """uint8 (B, C, H, W) -> float32 (x / 255 - mean) / std on the images' device; floats pass through untouched."""
    if images.is_floating_point():
        return images
    factor, shift = affine(data, images)
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    part = max(AT_ONCE // images[0].numel(), 1) if images.device.type == "cpu" and len(images) else max(len(images), 1)
    for some, into in zip(images.split(part), result.split(part), strict=True):
        into.copy_(some).mul_(factor).add_(shift)
    return result


def affine(data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
    """(factor, shift), (C, 1, 1) each on the images' device, so that factor * images + shift is normalised."""
    return _affine(tuple(data.mean), tuple(data.std), 1 if images.is_floating_point() else 255, images.device)


def finished(images: Tensor, data: Data) -> Tensor:
    """Cropped images (..., C, H, W) as they go into a batch: uint8 as it is, a source's float32 as (x - mean) / std."""
    if not images.is_floating_point():
        return images
    factor, shift = affine(data, images)
    return torch.addcmul(shift, images, factor)


@lru_cache(maxsize=8)  # sent to the device once
def _affine(mean: tuple[float, ...], std: tuple[float, ...], white: int, device: torch.device) -> tuple[Tensor, Tensor]:
    means, stds = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (mean, std))
    return (1 / (white * stds)).float().to(device), (-means / stds).float().to(device)
