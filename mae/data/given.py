"""Images that somebody holds already, as a source: arrays in memory, rows of numbers, paths of files, one folder."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.decode import in_channels
from mae.data.folder import IMAGES, Folder, Kind, find_images
from mae.data.sources import Source, fingerprint
from mae.errors import ConfigError

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as `in_channels` takes for whole numbers


class Arrays:
    """Images in memory, without labels."""

    classes: tuple[str, ...] | None = None
    labels: np.ndarray | None = None

    def __init__(self, images: np.ndarray, channels: int) -> None:
        """`images`: (N, H, W, C), uint8 or float32 in [0, 1]."""
        self.images, self.channels = images, channels

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, channels)."""
        image = self.images[index]
        if image.shape[2] == self.channels:
            return image
        if image.dtype == np.uint8:
            return in_channels(np.ascontiguousarray(image), self.channels)
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else (image @ LUMA)[..., None]

    def name_of(self, index: int) -> str:
        return f"image {index}"


def source_of(images: Any, channels: int, shape: Sequence[int] | None = None, kind: Kind = IMAGES) -> Source:
    """The source of images (N, H, W) or (N, H, W, C), of rows (N, H * W * C) with their `shape` (H, W) or (H, W, C), of paths, of a folder.

    The type of the numbers says what white is: 65535 of uint16, 255 of uint8 and of any other whole numbers, 1 of floats and booleans.
    They are read with as many `channels` where they are grey or colour; files as their `kind` is. Raises ConfigError for anything else.
    """
    if isinstance(images, str | os.PathLike):
        return _files([Path(images)], channels, kind)
    array = images if isinstance(images, np.ndarray) else np.asarray(images)
    if array.dtype.kind in "OUS" and array.ndim == 1:
        return _files([Path(os.fsdecode(path)) for path in array.tolist()], channels, kind)
    if array.ndim == 2:
        array = array.reshape(len(array), *_shape(array.shape[1], shape))
    array = array[..., None] if array.ndim == 3 else array
    if array.ndim != 4 or not array.size:
        raise ConfigError(f"images of shape {array.shape} are none: give (N, H, W), (N, H, W, C), or rows with image_shape=(H, W)")
    if array.shape[3] != channels and {array.shape[3], channels} != {1, 3}:
        raise ConfigError(f"images of shape {array.shape} have {array.shape[3]} channels, and the encoder takes {channels}")
    return Arrays(_pixels(array), channels)


def _shape(width: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    if shape is None:
        raise ConfigError(f"rows of {width} numbers are no images yet: say image_shape=(H, W) or (H, W, C)")
    if len(shape) not in (2, 3) or int(np.prod(shape)) != width:
        raise ConfigError(f"rows of {width} numbers do not have the image_shape {tuple(shape)}")
    return (*shape, 1) if len(shape) == 2 else tuple(shape)


def _pixels(array: np.ndarray) -> np.ndarray:
    """uint8, or float32 in [0, 1]."""
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"images of {array.dtype} are none: give uint8, uint16, or floats in [0, 1]")
    if array.dtype == np.uint16:
        return array.astype(np.float32) / np.float32(65535)
    lowest, highest = array.min(), array.max()
    white = 1 if array.dtype.kind in "bf" else 255
    if not (lowest >= 0 and highest <= white):
        raise ConfigError(f"pixels of {array.dtype} from {lowest:g} to {highest:g} are not from 0 to {white}: scale them")
    return array.astype(np.float32 if array.dtype.kind in "bf" else np.uint8, copy=False)


def _files(paths: list[Path], channels: int, kind: Kind) -> Folder:
    if len(paths) == 1 and paths[0].expanduser().is_dir():
        root = paths[0].expanduser()
        found = find_images(root, kind.extensions)
        if not found:
            raise ConfigError(f"{root} holds no images, nor do its subfolders: give another folder")
        return Folder(root, found, None, channels, kind=kind)
    whole = [path.expanduser().absolute() for path in paths]
    if lost := next((path for path in whole if not path.is_file()), None):
        raise ConfigError(f"there is no image {lost}")
    return Folder(Path("/"), [str(path).removeprefix("/") for path in whole], None, channels, kind=kind)
