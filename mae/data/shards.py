"""Tar shards in webdataset layout (KEY.jpg + KEY.cls), indexed once and read by offset: random access, exact epochs.

Streaming readers of the same format repeat and omit samples when ranks or workers change; an index does not.
"""

import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae.data import tar
from mae.data.decode import DamagedImage, decode
from mae.data.sources import Opened, Subset, fingerprint, name_hashes, path_of, share_of
from mae.errors import ConfigError
from mae.keys import Data

IMAGES = ("jpg", "jpeg", "png", "webp")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TEST_SHARE = 0.2  # where no shard is named after a held-out split
OPEN_FILES = 64  # descriptors kept open a process: opening is what costs on network file systems
INDEX_VERSION = 1


class Index(NamedTuple):
    """Where every image lies: arrays of length N."""

    shards: np.ndarray  # which shard, int64
    offsets: np.ndarray  # bytes, int64
    sizes: np.ndarray  # bytes, int64
    labels: np.ndarray  # int64, -1 = no .cls
    keys: np.ndarray  # what names the image in its shard, bytes

    def of_shards(self, numbers: list[int]) -> "Index":
        chosen = np.isin(self.shards, numbers)
        return Index(*(column[chosen] for column in self))


class Shards:
    """The images of an index. One instance is for one thread of each process; processes may share it by fork or pickle."""

    def __init__(self, root: Path, names: list[str], index: Index, classes: tuple[str, ...] | None, channels: int) -> None:
        """`names`: the shards' paths under root, which `index.shards` counts."""
        self.root, self.names, self.index, self.classes, self.channels = root, names, index, classes, channels
        self.labels = None if classes is None else index.labels
        self.fingerprint = fingerprint(index.keys, index.sizes, index.labels)
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # descriptors mean nothing in a process that was not forked

    def __len__(self) -> int:
        return len(self.index.keys)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, C) uint8. Raises DamagedImage."""
        name = self.name_of(index)
        size = int(self.index.sizes[index])
        try:
            content = os.pread(self._descriptor(self.names[self.index.shards[index]]), size, int(self.index.offsets[index]))
        except OSError as error:
            raise DamagedImage(name, error.strerror or str(error)) from error
        if len(content) != size:
            raise DamagedImage(name, "the shard was cut short after it was indexed")
        return decode(content, channels=self.channels, name=name)

    def name_of(self, index: int) -> str:
        return f"{self.names[self.index.shards[index]]}/{os.fsdecode(self.index.keys[index])}"

    def _descriptor(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.root / shard, os.O_RDONLY)
        return self._open[shard]

    def __del__(self) -> None:
        for descriptor in vars(self).get("_open", {}).values():
            os.close(descriptor)


def open_shards(data: Data) -> Opened:
    """The tar shards under `data.path`.

    Shards with train / val (validation) / test as a word of their path are those splits: `test` (else `val`) is for
    testing, `val` beside a `test` for validation, what has no such word for training. Without held-out or without train
    shards a fixed fifth of all images is for testing, chosen by a keyed hash of shard and key. Raises ConfigError for
    missing, damaged or unsafe shards.
    """
    root = path_of(data)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar"))
    if not names:
        raise ConfigError(f"data.path {root} holds no .tar shards: give the folder they lie in, or data.name=folder for image files")
    _check_sequence(root, names)
    index = cached_index(root, names)
    if not len(index.keys):
        raise ConfigError(f"the {len(names)} shards in {root} hold no images: members named KEY.{', KEY.'.join(IMAGES)} are looked for")
    classes = _classes(root, names, index)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number, name in enumerate(names):
        parts[_split_of(name)].append(number)

    def source(numbers: list[int]) -> Shards:
        return Shards(root, names, index.of_shards(numbers), classes, data.channels)

    held = [source(parts[split]) for split in ("test", "val") if parts[split]]
    if parts["train"] and held:
        return Opened(train=source(parts["train"]), test=held[0], validation=held[1] if len(held) > 1 else None)
    everything = source(list(range(len(names))))
    if len(everything) < 3:
        raise ConfigError(f"the shards in {root} hold {len(everything)} images: at least 3 are needed, to train, to validate and to test")
    test = share_of(name_hashes([everything.name_of(i) for i in range(len(everything))], data.split_seed), TEST_SHARE)
    return Opened(train=Subset(everything, ~test), test=Subset(everything, test))


def cached_index(root: Path, names: list[str]) -> Index:
    """The index of the shards, from the user's cache folder where the shards' names, sizes and times are still the same."""
    stats = [(name, status.st_size, status.st_mtime_ns) for name in names for status in [(root / name).stat()]]
    file = cache_folder() / f"shards-{hashlib.blake2b(json.dumps([INDEX_VERSION, stats]).encode(), digest_size=16).hexdigest()}.npz"
    try:
        with np.load(file, allow_pickle=False) as stored:
            return Index(*(stored[column] for column in Index._fields))
    except Exception:  # not there, or damaged: zip files raise a dozen kinds
        index = make_index(root, names)
    _store(file, index)
    return index


def make_index(root: Path, names: list[str]) -> Index:
    """Walks all shards. Raises ConfigError for a damaged or unsafe one, an unreadable label, or images without one among labelled ones."""
    rows = [(number, *row) for number, name in enumerate(names) for row in _samples(root / name)]
    columns = list(zip(*rows, strict=True)) or [()] * 5
    shards, offsets, sizes, labels = (np.array(column, np.int64) for column in columns[:4])
    index = Index(shards, offsets, sizes, labels, np.array([os.fsencode(key) for key in columns[4]], dtype=None if rows else "S1"))
    if len(labels) and labels.max() >= 0 and labels.min() < 0:
        bare = int(np.argmin(labels))
        raise ConfigError(f"{root / names[shards[bare]]}: {columns[4][bare]} has no .cls label but others have one: add it, or remove all")
    return index


def cache_folder() -> Path:
    """Where indices are kept between runs: $XDG_CACHE_HOME/mae or ~/.cache/mae."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae"


def _samples(path: Path) -> Iterator[tuple[int, int, int, str]]:
    """(offset, size, label, name) of every image of a shard. A key is the name up to the first dot, as in webdataset."""
    images: dict[str, tar.Member] = {}
    labels: dict[str, int] = {}
    for member in tar.members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}"
        if extension.lower() in IMAGES:
            if key in images:
                raise ConfigError(f"{path} has two images of the key {key.lstrip('/')}, at byte {member.offset}: keep one image a key")
            images[key] = member
        elif extension.lower() == "cls":
            text = member.head.strip() if member.size <= tar.HEAD else b""
            if not re.fullmatch(rb"\d{1,9}", text):
                raise ConfigError(f"{path}: {member.name} at byte {member.offset} holds {text[:20]!r}, a label is a number from 0")
            labels[key] = int(text)
    for key, member in images.items():
        yield member.offset, member.size, labels.get(key, -1), member.name


def _store(file: Path, index: Index) -> None:
    """Writes the index whole or not at all; a cache that cannot be written only costs time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
            np.savez(temporary, **index._asdict())
        os.replace(temporary.name, file)
    except OSError:
        return


def _split_of(name: str) -> str:
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def _check_sequence(root: Path, names: list[str]) -> None:
    """Names the shards that are missing from a numbered sequence or from timm's _info.json."""
    sequences: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d+)\.tar", name):
            sequences.setdefault((match[1], len(match[2])), set()).add(int(match[2]))
    missing = [
        f"{prefix}{number:0{digits}}.tar"
        for (prefix, digits), numbers in sequences.items()
        for number in sorted(set(range(min(numbers), max(numbers) + 1)) - numbers)
    ]
    for split in (_info(root).get("splits") or {}).values():
        listed = split.get("filenames") or []
        if set(listed) & set(names):  # a split that was not copied at all is not missed
            missing += [name for name in listed if name not in names and name not in missing]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ConfigError(f"{root} lacks shards of a sequence, {', '.join(missing[:8])}{more}: copy them too")


def _info(root: Path) -> dict[str, Any]:
    try:
        content = json.loads((root / "_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _classes(root: Path, names: list[str], index: Index) -> tuple[str, ...] | None:
    """Names from classes.txt (one a line) or _info.json, else numbers; None where there are no labels."""
    count = int(index.labels.max()) + 1
    if count == 0:
        return None
    file = root / "classes.txt"
    listed = file.read_text().split("\n") if file.is_file() else _info(root).get("class_names") or []
    classes = tuple(str(name).strip() for name in listed if str(name).strip())
    if classes and len(classes) < count:
        at = int(np.argmax(index.labels))
        raise ConfigError(f"{root} names {len(classes)} classes but {names[index.shards[at]]} has the label {count - 1}: name every class")
    return classes or tuple(str(label) for label in range(count))
