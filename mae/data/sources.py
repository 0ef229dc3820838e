"""Where images come from: a Source gives image i at its own size, Splits are the three that a run is built on.

Validation is carved from the training images by a keyed hash of their position, for every source alike (big_vision's
habit of choosing on a part of train); the test images are touched once.
"""

import hashlib
import importlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mae.data.decode import DamagedImage
from mae.errors import ConfigError
from mae.keys import Data, public

# data.name -> the module of this folder and its function that opens it: Data -> Opened
OPENERS = {
    "digits": ("digits", "open_digits"),
    "shapes": ("shapes", "open_shapes"),
    "folder": ("folder", "open_folder"),
    "shards": ("shards", "open_shards"),
    "stream": ("stream", "open_stream_of_shards"),
    "arrays": ("arrays", "open_arrays"),
    "cifar10": ("torchvision_sets", "open_cifar10"),
    "cifar100": ("torchvision_sets", "open_cifar100"),
    "mnist": ("torchvision_sets", "open_mnist"),
    "fashion_mnist": ("torchvision_sets", "open_fashion_mnist"),
    "stl10": ("torchvision_sets", "open_stl10"),
    "stl10_unlabeled": ("torchvision_sets", "open_stl10_unlabeled"),
    "dsprites": ("dsprites", "open_dsprites"),
    "hf": ("huggingface", "open_hf"),
}


class Factors(NamedTuple):
    """What every image was made of, where that is known."""

    values: np.ndarray  # (N, F) int64, from 0
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # how many values each factor has
    ordered: tuple[bool, ...]  # False: a category, its numbers mean nothing


class Source(Protocol):
    """A fixed sequence of images.

    Optional, asked for with getattr(..., None): `factors`, a Factors; `mask(index)`, the (H, W) uint8 class of every pixel of an
    image's own size (255 = not said), with `mask_classes`, their names.
    """

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names, index = label; None where nothing is labelled."""

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64; None where nothing is labelled."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of names, sizes and labels: the same data give the same digits wherever they lie."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """Image `index` at its own size (H, W, C): uint8, or float32 scaled to [0, 1] where a source keeps more. Raises DamagedImage."""

    def name_of(self, index: int) -> str:
        """What a person finds the image by, for logs."""


class Subset:
    """Some images of a source; their ids are positions in `chosen`."""

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        """`chosen`: (M,) positions in the source, or an (N,) bool mask, which keeps the source's order."""
        self.source = source
        self.positions = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    @cached_property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.positions]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.source.fingerprint, self.positions)

    @cached_property
    def factors(self) -> Factors | None:
        every = getattr(self.source, "factors", None)
        return None if every is None else every._replace(values=every.values[self.positions])

    @property
    def mask(self) -> Callable[[int], np.ndarray] | None:
        of_source = getattr(self.source, "mask", None)
        return None if of_source is None else lambda index: of_source(int(self.positions[index]))

    @property
    def mask_classes(self) -> tuple[str, ...] | None:
        return getattr(self.source, "mask_classes", None)

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, index: int) -> np.ndarray:
        return self.source.read(int(self.positions[index]))

    def name_of(self, index: int) -> str:
        return self.source.name_of(int(self.positions[index]))


def file_of(source: Source, index: int) -> bytes | None:
    """The file that an image is read from; None where the source reads none. Raises DamagedImage."""
    while isinstance(source, Subset):
        index = int(source.positions[index])
        source = source.source
    return source.content(index) if hasattr(source, "content") else None


class Splits(NamedTuple):
    """What is learnt from, what choices are made on, and what is measured once at the end."""

    train: Source  # without the validation images
    validation: Source
    test: Source | None

    @property
    def test_images(self) -> Source:
        """The test split, for those who cannot do without. Raises ConfigError where there is none."""
        if self.test is None:
            raise ConfigError("the data has no test split: put test images into a folder test/ beside train/")
        return self.test


class Opened(NamedTuple):
    """What lies on the disk, before validation is carved from it."""

    train: Source
    validation: Source | None = None
    test: Source | None = None


def open_splits(data: Data) -> Splits:
    """Opens the data that the configuration names.

    Validation is the data's own where it has one beside a test split, else `data.validation` of the training images, chosen by
    `data.split_seed`; both sides keep at least one image. Raises ConfigError for a missing or empty path, images that
    cannot be read, damaged shards.
    """
    if not data.mean or not data.std:
        raise ConfigError(
            "data.mean and data.std are not known yet: `mae statistics` with the same words and --out FILE.yaml computes them, add the file"
        )
    if data.resize < 1:
        raise ConfigError(f"data.resize {data.resize} is below 1, smaller than the centre crop that follows: choose 1 or more")
    train, validation, test = open_parts(data)
    _check_readable(train, data)
    if validation is None:
        if len(train) < 2:
            raise ConfigError(
                f"{public(data.path) or data.name} leaves {len(train)} image for training: give more, one is held out for validation"
            )
        held = share_of(position_hashes(len(train), data.split_seed), data.validation)
        train, validation = Subset(train, ~held), Subset(train, held)
    return Splits(train, validation, test)


def open_parts(data: Data) -> Opened:
    """What lies there, before anything is held out or read. Raises ConfigError as `open_splits`."""
    if data.name not in OPENERS:
        raise ConfigError(f"data.name {data.name!r} is unknown: choose one of {', '.join(OPENERS)}")
    if data.channels not in (1, 3) and data.name != "arrays":
        raise ConfigError(
            f"data.channels {data.channels} is not possible for {data.name}: choose 1 (grey) or 3 (RGB), or data.name=arrays for others"
        )
    if data.length is not None and data.name not in ("shapes", "dsprites", "stream"):
        raise ConfigError(f"data.length={data.length} is for shapes, dsprites and stream: leave it out for {data.name}")
    module, function = OPENERS[data.name]  # imported here, not above: they build on the types of this module
    opened: Opened = getattr(importlib.import_module(f"mae.data.{module}"), function)(data)
    return opened


def path_of(data: Data) -> Path:
    """The folder `data.path`. Raises ConfigError where it is missing or no folder."""
    if not data.path:
        raise ConfigError(f"data.path is missing: say where the {data.name} lies with data.path=FOLDER")
    if is_url(data.path):
        raise ConfigError(f"data.path {public(data.path)} is no folder: only data.name=shards is read from the web, by http:// or https://")
    path = Path(data.path).expanduser()
    if path.is_file():
        raise ConfigError(f"data.path {path} is a file: give the folder that holds it, data.path={path.parent}")
    if not path.is_dir():
        raise ConfigError(f"data.path {path} does not exist: give an existing folder with data.path=FOLDER")
    return path


def is_url(path: str) -> bool:
    """Whether a path names something that is not a file here: https://..., s3://..., pipe:..."""
    return "://" in path or path.startswith("pipe:")


def cache_folder() -> Path:
    """What is kept between runs, and may be deleted at any time: $XDG_CACHE_HOME/mae or ~/.cache/mae."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"


def fingerprint(*parts: str | np.ndarray) -> str:
    """16 hex digits that tell these strings and arrays from any others."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def position_hashes(length: int, seed: int) -> np.ndarray:
    """(length,) int64, a keyed hash of every position."""
    from mae.nets.keyed import STREAMS, hash_integers  # torch comes with it: a wrong path is answered before

    return hash_integers(seed, STREAMS["split"], np.arange(length))


def name_hashes(names: list[str], seed: int) -> np.ndarray:
    """(N,) int64, a keyed hash of every name: an image's part does not depend on which others there are."""
    key = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest() for name in names)
    return np.frombuffer(digests, np.int64)


def share_of(hashes: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool: the share of the positions with the smallest hashes, rounded; both sides get at least one (N >= 2)."""
    count = min(max(round(share * len(hashes)), 1), len(hashes) - 1)
    most = np.partition(hashes, count - 1)[count - 1]  # not sorted: there may be millions
    chosen = hashes < most
    chosen[np.flatnonzero(hashes == most)[: count - chosen.sum()]] = True  # of equal ones the first
    return chosen


def _check_readable(source: Source, data: Data) -> None:
    """One image must open, or a wrong folder would be noticed only when training starts."""
    tried = np.unique(np.linspace(0, len(source) - 1, 10).astype(int))
    for index in tried:
        try:
            source.read(int(index))
            return
        except DamagedImage as error:
            damage = error
    raise ConfigError(f"none of {len(tried)} images tried in {public(data.path) or data.name} can be read ({damage}): check data.path")
