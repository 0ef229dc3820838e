"""CIFAR-10 and -100, MNIST, Fashion-MNIST and STL-10, downloaded, checked against their checksums and unpacked by torchvision.

What torchvision finds whole is never downloaded again; CIFAR's files, which are pickles, are opened only where their bytes are the
published ones. CIFAR-10 may also lie in `data.path` as tar shards.
"""

import contextlib
import fcntl
import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.decode import in_channels
from mae.data.shards import open_shards
from mae.data.sources import Opened, cache_folder, fingerprint, path_of
from mae.errors import ConfigError
from mae.keys import Data

SILENCE_SECONDS = 30  # of a server, until it is given up
STL_SIDE = 96


class ImageSet:
    """Images of one size that lie in memory or, as one file, on the disk."""

    def __init__(self, name: str, images: Any, labels: np.ndarray | None, classes: tuple[str, ...] | None, channels: int) -> None:
        """`images[i]`: (H, W, 1 or 3) uint8; `labels` (N,) int64."""
        self.name, self.images, self.labels, self.classes, self.channels = name, images, labels, classes, channels
        self.fingerprint = fingerprint(name, np.array([len(images), *images[0].shape]), np.zeros(0) if labels is None else labels)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, C) uint8."""
        return in_channels(self.images[index], self.channels)

    def name_of(self, index: int) -> str:
        return f"{self.name} {index}"


class StlFile:
    """The images of one of STL-10's files, (96, 96, 3) uint8 each: mapped, for some take 2.8 GB, and not sent to workers."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.mapped: Any = None
        self.length = file.stat().st_size // (3 * STL_SIDE**2)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "mapped": None}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        if self.mapped is None:
            self.mapped = np.memmap(self.file, np.uint8, "r", shape=(self.length, 3, STL_SIDE, STL_SIDE))
        return np.array(self.mapped[index].transpose(2, 1, 0))  # stored as channels, columns, rows


def open_cifar10(data: Data) -> Opened:
    """CIFAR-10 (50,000 + 10,000 of 32 x 32), or the tar shards in `data.path` where there are some. Raises ConfigError as _parts."""
    if data.path and any(path_of(data).rglob("*.tar")):
        return open_shards(data)
    return _cifar("CIFAR10", data)


def open_cifar100(data: Data) -> Opened:
    """CIFAR-100 with its hundred fine classes (50,000 + 10,000 of 32 x 32). Raises ConfigError as _parts."""
    return _cifar("CIFAR100", data)


def open_mnist(data: Data) -> Opened:
    """MNIST (60,000 + 10,000 of 28 x 28). Raises ConfigError as _parts."""
    return _mnist("MNIST", data)


def open_fashion_mnist(data: Data) -> Opened:
    """Fashion-MNIST (60,000 + 10,000 of 28 x 28). Raises ConfigError as _parts."""
    return _mnist("FashionMNIST", data)


def open_stl10(data: Data) -> Opened:
    """STL-10's labelled images (5,000 + 8,000 of 96 x 96). Raises ConfigError as _parts."""
    folder, labels, classes = _stl(data)

    def part(split: str) -> ImageSet:
        """Images and labels of train or test."""
        return ImageSet(f"stl10 {split}", StlFile(folder / f"{split}_X.bin"), labels[split], classes, data.channels)

    return Opened(train=part("train"), test=part("test"))


def open_stl10_unlabeled(data: Data) -> Opened:
    """STL-10's 100,000 unlabelled images to learn from; the 8,000 test images, without their labels, are for testing.

    What an encoder of them is worth is measured on stl10, whose images are others. Raises ConfigError as _parts.
    """
    folder, _, _ = _stl(data)
    train, test = (
        ImageSet(f"stl10 {split}, no labels", StlFile(folder / f"{split}_X.bin"), None, None, data.channels)
        for split in ("unlabeled", "test")
    )
    return Opened(train=train, test=test)


def _cifar(name: str, data: Data) -> Opened:
    def part(found: Any, split: str) -> ImageSet:
        """What torchvision read of train or test."""
        return ImageSet(f"{name} {split}", found.data, np.array(found.targets, np.int64), tuple(found.classes), data.channels)

    train, test = _parts(name, data, [{"train": True}, {"train": False}])
    return Opened(train=part(train, "train"), test=part(test, "test"))


def _mnist(name: str, data: Data) -> Opened:
    def part(found: Any, split: str) -> ImageSet:
        """What torchvision read of train or test."""
        images = found.data.numpy()[..., None]  # (N, 28, 28, 1)
        return ImageSet(f"{name} {split}", images, found.targets.numpy().astype(np.int64), tuple(found.classes), data.channels)

    train, test = _parts(name, data, [{"train": True}, {"train": False}])
    return Opened(train=part(train, "train"), test=part(test, "test"))


def _stl(data: Data) -> tuple[Path, dict[str, np.ndarray], tuple[str, ...]]:
    """The folder of the files, the labels by split, the classes."""
    found = _parts("STL10", data, [{"split": "train"}])[0]
    folder = Path(found.root) / found.base_folder
    labels = {split: np.fromfile(folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1 for split in ("train", "test")}
    return folder, labels, tuple(found.classes)


def _parts(name: str, data: Data, splits: list[dict[str, Any]]) -> list[Any]:
    """torchvision's data sets of these splits.

    Raises ConfigError where `data.path` is no folder, where the data are not there and cannot be downloaded, and where they are damaged.
    """
    from torchvision import datasets

    kind = getattr(datasets, name)
    inside = Path(getattr(kind, "base_folder", f"{name}/raw"))
    root = _outside(path_of(data), inside) if data.path else cache_folder() / "torchvision"
    found = _read(kind, root, splits)
    if found is not None:
        return found
    with _one_process_at_a_time(root), _impatient():
        logging.getLogger("mae").info("%s is not (whole) in %s: torchvision brings it", name, root)
        try:
            kind(str(root), **splits[0], download=True)
        except (OSError, RuntimeError) as error:
            reason = re.findall(r"<urlopen error (?:\[\w+ -?\d+\] )?(.*?)>", str(error))[-1:] or [" ".join(str(error).split())]
            archive = (
                f"put {kind.url} into {root}" if hasattr(kind, "url") else f"put the .gz files of {kind.mirrors[0]} into {root / inside}"
            )
            raise ConfigError(
                f"{name} is not whole in {root}, nor can it be downloaded ({reason[0]}): connect this machine, or {archive}"
            ) from error
    return _read(kind, root, splits) or []


def _read(kind: Callable[..., Any], root: Path, splits: list[dict[str, Any]]) -> list[Any] | None:
    """torchvision's data sets, or None where it finds their files missing or not as published."""
    try:
        return [kind(str(root), **split) for split in splits]
    except (RuntimeError, AssertionError, ValueError, TypeError, EOFError, IndexError) as error:
        if "not found" in str(error):
            return None
        reason = str(error) or type(error).__name__  # MNIST's files have no checksums once they are unpacked
        raise ConfigError(f"the files in {root} are damaged ({reason}): delete them, then they are brought again") from error


def _outside(path: Path, inside: Path) -> Path:
    """The folder that torchvision means, where the path is the one that it makes in there, or one of those above the files."""
    for depth in range(len(inside.parts), 0, -1):
        if path.parts[-depth:] == inside.parts[:depth]:
            return Path(*path.parts[:-depth])
    return path


@contextlib.contextmanager
def _one_process_at_a_time(root: Path) -> Iterator[None]:
    """The ranks of a run, which all open the data, wait for the one that downloads."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".downloading", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise ConfigError(f"{root} lacks the data and cannot be written to: choose another data.path") from error


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """torchvision would wait for a silent server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
