"""A folder of image files: class folders as in torchvision's ImageFolder, or any tree of images without labels; or a list of them."""

import errno
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae.data.decode import EXTENSIONS, DamagedImage, decode, decode_classes
from mae.data.sources import Opened, Subset, fingerprint, name_hashes, path_of, share_of
from mae.errors import ConfigError
from mae.keys import Data

LIST = ".txt"  # how a list of files ends
HELD_OUT = ("test", "val", "validation")  # in this order: the first that fits is the test split
TEST_SHARE = 0.2  # where there is none
SEGMENTS = "masks"  # beside data.path: the classes of the images' pixels
MASKS = "ground_truth"  # beside train and test: which pixels of the test images are anomalous, as in MVTec AD


class Kind(NamedTuple):
    """Which files of a folder are meant, and how their bytes become pixels."""

    extensions: tuple[str, ...]
    decode: Callable[..., np.ndarray]  # (content, channels=, name=) -> (H, W, C); raises DamagedImage


IMAGES = Kind(EXTENSIONS, decode)


class Folder:
    """Image files under one root, in the order of their paths."""

    def __init__(
        self,
        root: Path,
        paths: list[str],
        classes: tuple[str, ...] | None,
        channels: int,
        segments: Path | None = None,
        *,
        kind: Kind = IMAGES,
        labels: np.ndarray | None = None,
    ) -> None:
        """`paths` are relative to the root, with /; with `classes`, each is CLASS/FILE unless `labels` (N,) int64 are given.

        `segments`: the folder of the pixels' classes. `kind`: which files these are.
        """
        self.root, self.classes, self.channels, self.kind = root, classes, channels, kind
        self.segments = segments if segments is not None and segments.is_dir() else None
        self.paths = np.array([os.fsencode(path) for path in paths])  # one array, not a million objects to copy to workers
        index = {name: i for i, name in enumerate(classes or ())}
        if classes is not None and labels is None:
            labels = np.array([index[path.split("/")[0]] for path in paths], np.int64)
        self.labels = labels

    @cached_property
    def fingerprint(self) -> str:
        """Names, sizes in bytes and labels; of the masks' files too."""
        names = [self.name_of(i) for i in range(len(self))]
        files = [self.root / name for name in names]
        if self.segments is not None:
            files += [file for name in names if (file := _segments_of(self.segments, name)).exists()]
        sizes = np.array([_bytes(file) for file in files], np.int64)
        return fingerprint("\n".join(names), sizes, np.zeros(0) if self.labels is None else self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, C), uint8 or as its kind is. Raises DamagedImage."""
        return self.kind.decode(self.content(index), channels=self.channels, name=self.name_of(index))

    def content(self, index: int) -> bytes:
        """The bytes of the image's file. Raises DamagedImage."""
        name = self.name_of(index)
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise DamagedImage(name, error.strerror or str(error)) from error

    def name_of(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    @property
    def mask(self) -> Callable[[int], np.ndarray] | None:
        """Where there is a folder masks/ beside the images': index -> (H, W) uint8, the class of every pixel. ConfigError without one."""
        folder = self.segments
        return None if folder is None else lambda index: decode_classes(_segments_of(folder, self.name_of(index)))


def _bytes(file: Path) -> int:
    """The file's size; -1 for a link to nowhere, which is a damaged image."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _segments_of(folder: Path, name: str) -> Path:
    return (folder / name).with_suffix(".png")


def open_folder(data: Data, kind: Kind = IMAGES) -> Opened:
    """The images under `data.path`, or those of the list that it is.

    ROOT/train with ROOT/test, ROOT/val or ROOT/validation are the splits where they exist, provided that every image lies
    in one of them: `test` (else `val`) is for testing, and `val` beside a `test` is for validation. A held-out folder
    without the classes of train (ImageNet's test) is passed over. Where all of train is one class (train/good) and the held-out
    folder has others beside it (test/good, test/scratch), as in MVTec AD, the training images have no labels and the held-out
    ones do; masks in ROOT/ground_truth are no images. Otherwise a fixed fifth is for testing, chosen by a keyed hash of the
    paths. A folder masks/ beside ROOT holds, under the images' relative names with .png, the class of every pixel. Raises ConfigError
    where there are too few images.
    """
    if data.path and data.path.endswith(LIST) and Path(data.path).expanduser().is_file():
        from mae.data.lists import open_list  # it builds on this module

        return open_list(Path(data.path).expanduser(), data, kind)
    root = path_of(data)
    segments = root.absolute().parent / SEGMENTS
    paths = find_images(root, kind.extensions)
    if not paths:
        raise ConfigError(f"data.path {root} holds no images: {', '.join(kind.extensions)} files are looked for, in its subfolders too")
    tops = {path.split("/")[0] if "/" in path else "" for path in paths}
    if {"train", "test"} <= tops:
        tops.discard(MASKS)
    parts = {top: [p.removeprefix(f"{top}/") for p in paths if p.startswith(f"{top}/")] for top in ("train", *HELD_OUT) if top in tops}
    if "train" not in parts or len(parts) < len(tops):
        return with_test_share(Folder(root, paths, classes_of(paths), data.channels, segments, kind=kind), data)
    classes = classes_of(parts["train"])
    train = Folder(root / "train", parts["train"], classes, data.channels, segments / "train", kind=kind)
    held = [
        Folder(root / top, parts[top], classes or _beside(parts["train"], parts[top]), data.channels, segments / top, kind=kind)
        for top in HELD_OUT
        if _fits(root, top, parts.get(top), classes)
    ]
    if not held:
        return with_test_share(train, data)
    return Opened(train=train, test=held[0], validation=held[1] if len(held) > 1 else None)


def find_images(root: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Relative paths, with /, of all image files (or others) under root, sorted; links are followed once.

    Hidden names are passed over, and pipes and devices, which would keep a reader waiting; links to nowhere are not. Raises ConfigError
    for a folder that cannot be listed.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    left = [(str(root), "")]  # folders, the next one last
    try:
        while left:
            folder, prefix = left.pop()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link back up
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name, reverse=True)  # of two links to a folder the first, on any disk
            for entry in inside:
                if entry.name.startswith(".") or entry.name == "lost+found":
                    continue
                if _told(entry.is_dir):
                    left.append((entry.path, f"{prefix}{entry.name}/"))
                elif entry.name.lower().endswith(extensions) and (_told(entry.is_file) or not os.path.exists(entry.path)):
                    found.append(prefix + entry.name)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be listed ({error.strerror}): make it readable or move it out of data.path") from error
    return sorted(found)


def _told(ask: Callable[[], bool]) -> bool:
    """What a folder's entry says of itself; of a link to itself nothing is true."""
    try:
        return ask()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def classes_of(paths: list[str]) -> tuple[str, ...] | None:
    """Class names where the folders say them: every image is CLASS/FILE, in at least two classes. Else None.

    Raises ConfigError as `check_writable`.
    """
    parts = [path.split("/") for path in paths]
    names = {part[0] for part in parts}
    if not (all(len(part) == 2 for part in parts) and len(names) > 1):
        return None
    check_writable(names)
    return tuple(sorted(names))


def check_writable(classes: Iterable[str]) -> None:
    """Raises ConfigError for a class whose name is no text, which would end a run where its results are written."""
    odd = [name for name in classes if not name.isascii() and os.fsencode(name).decode("utf-8", "replace") != name]
    if odd:
        raise ConfigError(f"the class {os.fsencode(min(odd))!r} has a name that is no UTF-8: rename it")


def _fits(root: Path, top: str, paths: list[str] | None, classes: tuple[str, ...] | None) -> bool:
    if not paths or classes is None:
        return bool(paths)
    if any(path.count("/") != 1 for path in paths):
        return False
    unknown = sorted({path.split("/")[0] for path in paths} - set(classes))
    if unknown:
        raise ConfigError(f"{root / top / unknown[0]} is no class of {root / 'train'}: give both the same class folders")
    return True


def _beside(train: list[str], held_out: list[str]) -> tuple[str, ...] | None:
    """The classes of held-out images where all training images are of one of them; else None."""
    classes, only = classes_of(held_out), {path.split("/")[0] for path in train}
    return classes if len(only) == 1 and only < set(classes or ()) else None


def with_test_share(source: Folder, data: Data) -> Opened:
    """A fixed fifth for testing, chosen by a keyed hash of the paths. Raises ConfigError for fewer than 3 images."""
    if len(source) < 3:
        raise ConfigError(
            f"data.path {source.root} holds too few images, {len(source)}: at least 3 are needed, to train, to validate and to test"
        )
    test = share_of(name_hashes([source.name_of(i) for i in range(len(source))], data.split_seed), TEST_SHARE)
    return Opened(train=Subset(source, ~test), test=Subset(source, test))
