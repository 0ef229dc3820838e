"""Data that fits in memory: decoded once into one tensor, from which batches are cut without a loop over samples."""

import math
import os

import numpy as np
import torch
from torch import Tensor

from mae.config import Config
from mae.data import crops, substitute
from mae.data.batch import Samples, affine, finished, to_device
from mae.data.decode import DamagedImage
from mae.data.plain import numbers_of
from mae.data.resample import crop_batch
from mae.data.sources import Source
from mae.errors import ConfigError

PROBES = 16  # images looked at to see whether all have one size


class _OtherSize(Exception):
    """An image differs in size from those before it."""


class Cache:
    """All images of a source as one tensor (N, H, C, W) of its type, in the computer's memory or (data.cache: device) on the device.

    The rows of all channels lie side by side, as `crop_batch` likes it; batches are (B, C, H, W) all the same, by their strides.
    Images of one size are kept as they are. Images of several sizes are first brought to one: scaled to cover
    image_size x data.resize and centre-cropped to that.
    """

    def __init__(self, source: Source, config: Config, device: torch.device) -> None:
        """Decodes everything. Raises ConfigError where it does not fit or nothing can be read."""
        self.source, self.data, self.size, self.device = source, config.data, config.image_size, device
        self.damaged: dict[int, DamagedImage] = {}
        height, width = (round(side * config.data.resize) for side in config.image_size)
        own = self._own_size()
        try:
            self.images = self._decode(own or (height, width), keep=own is not None)
        except _OtherSize:
            self.images = self._decode((height, width), keep=False)
        if config.data.cache == "device":
            self.images = _moved(self.images, device)

    def samples(self, ids: np.ndarray, keys: np.ndarray) -> Samples:
        """Cropped and mirrored as (B,) keys say, images (B,) ids, on the device. Raises ConfigError for too much damage."""
        shown, damage = self._ids_shown(ids, keys)
        images = self.images.index_select(0, to_device(shown, self.images.device)).transpose(1, 2)
        if images.device.type != self.device.type:
            images = to_device(images, self.device)
        images = self._augmented(images, keys)
        return Samples(images, numbers_of(self.source, ids, keys, shown), shown != ids, damage)

    def _augmented(self, images: Tensor, keys: np.ndarray) -> Tensor:
        tall, wide = images.shape[2:]
        flips = crops.flips(keys) if self.data.flip else None
        scale = (self.data.crop_scale[0], self.data.crop_scale[1])
        if (tall, wide) == self.size and scale == (1, 1):  # exact pixels
            mirrored = images if flips is None else torch.where(to_device(flips, self.device)[:, None, None, None], images.flip(3), images)
            return finished(mirrored, self.data)
        sides = np.full(len(keys), tall), np.full(len(keys), wide)
        boxes = crops.boxes(keys, *sides, scale=scale, aspect=self.size[1] / self.size[0])
        return crop_batch(images, boxes, flips, self.size, affine(self.data, images))  # normalised while it is at hand

    def _ids_shown(self, ids: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, list[DamagedImage]]:
        shown, damage = ids.copy(), []
        if self.damaged:
            for i in np.flatnonzero(np.isin(ids, list(self.damaged))):
                damage.append(self.damaged[int(ids[i])])
                sound = [c for c in substitute.candidates(int(keys[i]), len(self.source)) if int(c) not in self.damaged]
                if not sound:
                    raise substitute.too_much(damage[-1])
                shown[i] = sound[0]
        return shown, damage

    def _own_size(self) -> tuple[int, int] | None:
        """The size of the images if a few of them have the same."""
        sizes = set()
        for index in np.unique(np.linspace(0, len(self.source) - 1, PROBES).astype(int)):
            try:
                sizes.add(self.source.read(int(index)).shape[:2])
            except DamagedImage:
                continue  # met again, and noted, when everything is decoded
        return sizes.pop() if len(sizes) == 1 else None

    def _decode(self, size: tuple[int, int], *, keep: bool) -> Tensor:
        self.damaged.clear()
        images = None
        for index in range(len(self.source)):
            try:
                pixels = self.source.read(index)
            except DamagedImage as error:
                self.damaged[index] = error
                continue
            if keep and pixels.shape[:2] != size:
                raise _OtherSize
            if images is None:
                images = _allocate((len(self.source), size[0], pixels.shape[2], size[1]), pixels.dtype)
            images[index] = (pixels if keep else crops.central(pixels, size, 1.0)).transpose(0, 2, 1)
        if images is None:
            raise substitute.too_much(self.damaged[0])
        return torch.from_numpy(images)


def _allocate(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """Zeros (N, H, C, W), if the machine has so much memory for each of its ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
    need, have = ranks * math.prod(shape) * kind.itemsize, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        whose = f"{ranks} ranks with {shape[0]:,} images each" if ranks > 1 else f"{shape[0]:,} images"
        raise ConfigError(f"data.cache needs {need / 2**30:.0f} GiB for {whose}, of {have / 2**30:.0f}: set data.cache=none")
    return np.zeros(shape, kind)


def _moved(images: Tensor, device: torch.device) -> Tensor:
    try:
        return images.to(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"data.cache=device: {images.nbytes / 2**30:.1f} GiB do not fit on {device}: try ram or none") from error
