"""Tar shards in webdataset layout (KEY.jpg + KEY.cls), indexed once and read by offset: random access, exact epochs.

Streaming readers of the same format repeat and omit samples when ranks or workers change; an index does not.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae.data import info
from mae.data.decode import DamagedImage, decode
from mae.data.index import IMAGES, Index, cached_index
from mae.data.remote import fetch
from mae.data.sources import Opened, Subset, cache_folder, fingerprint, is_url, path_of, share_of
from mae.errors import ConfigError
from mae.keys import Data
from mae.nets.keyed import hash_integers

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
TEST_SHARE = 0.2  # where no shard is named after a held-out split
OPEN_FILES = 64  # descriptors kept open a process: opening is what costs on network file systems
UNFINISHED = ".unfinished"  # what `mae shard` keeps in the folder while it writes


class Shards:
    """The images of an index. One instance is for one thread of each process; processes may share it by fork or pickle."""

    def __init__(self, root: Path, names: list[str], index: Index, classes: tuple[str, ...] | None, channels: int) -> None:
        """`names`: the shards' paths under root, which `index.shards` counts. Raises ConfigError where only some images have labels."""
        self.root, self.names, self.index, self.channels = root, names, index, channels
        self.classes = classes if classes is not None and index.labels.max(initial=-1) >= 0 else None
        if self.classes is not None and index.labels.min() < 0:
            bare = int(np.argmin(index.labels))
            raise ConfigError(f"{root / self.name_of(bare)} has no .cls label but others have one: add it, or remove all")
        self.fingerprint = fingerprint(index.digests)
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # descriptors mean nothing in a process that was not forked

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.classes is None else self.index.labels

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, C) uint8. Raises DamagedImage."""
        return decode(self.content(index), channels=self.channels, name=self.name_of(index))

    def content(self, index: int) -> bytes:
        """The image's file as it was stored. Raises DamagedImage where it cannot be read."""
        name = self.name_of(index)
        size = int(self.index.sizes[index])
        try:
            content = os.pread(self._descriptor(self.names[self.index.shards[index]]), size, int(self.index.offsets[index]))
        except OSError as error:
            raise DamagedImage(name, error.strerror or str(error)) from error
        if len(content) != size:
            raise DamagedImage(name, "the shard was cut short after it was indexed")
        return content

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
    """The tar shards under `data.path`, or behind it where it is a URL.

    timm's _info.json says which shards make which split; where it does not, a word of the path does: train, val (validation) or test.
    `test` (else `val`) is for testing, `val` beside a `test` for validation, the others for training. Without held-out or without train
    shards a fixed fifth of all images is for testing, chosen by a keyed hash of shard and key. Raises ConfigError for
    missing, damaged or unsafe shards.
    """
    remote = data.path is not None and is_url(data.path)
    root, names = fetch(data.path or "", cache_folder() / "remote") if remote else _found(data)
    told = info.read(root)
    index = cached_index(root, names, cache_folder())
    if not len(index):
        raise ConfigError(f"the {len(names)} shards in {root} hold no images: members named KEY.{', KEY.'.join(IMAGES)} are looked for")
    info.check_lengths(told, root, names, index.shards)
    classes = _classes(root, names, index, told)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    splits = info.splits_of(told)
    for number, name in enumerate(names):
        parts[splits.get(name) or split_of(name)].append(number)

    def source(numbers: list[int]) -> Shards:
        return Shards(root, names, index.of_shards(numbers), classes, data.channels)

    held = [source(parts[split]) for split in ("test", "val") if parts[split]]
    if parts["train"] and held:
        return Opened(train=source(parts["train"]), test=held[0], validation=held[1] if len(held) > 1 else None)
    everything = source(list(range(len(names))))
    if len(everything) < 3:
        raise ConfigError(
            f"the shards in {root} hold too few images, {len(everything)}: at least 3 are needed, to train, to validate and to test"
        )
    test = share_of(hash_integers(data.split_seed, index.hashes), TEST_SHARE)
    return Opened(train=Subset(everything, ~test), test=Subset(everything, test))


def _found(data: Data) -> tuple[Path, list[str]]:
    """The folder `data.path` and the shards below it, sorted. Raises ConfigError where some or all are missing."""
    root = path_of(data)
    if (root / UNFINISHED).exists():
        raise ConfigError(f"{root} is not finished: run the same `mae shard` again, which goes on where it stopped")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar"))
    if not names:
        raise ConfigError(f"data.path {root} holds no .tar shards: give the folder they lie in, or data.name=folder for image files")
    check_sequence(root, names)
    return root, names


def split_of(name: str) -> str:
    """train | val | test: the first word of a shard's path that says it; train where none does."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def check_sequence(root: Path, names: list[str]) -> None:
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
    missing += [name for name in info.missing(info.read(root), names) if name not in missing]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ConfigError(f"{root} lacks shards of a sequence, {', '.join(missing[:8])}{more}: copy them too")


def _classes(root: Path, names: list[str], index: Index, told: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names from classes.txt (one a line) or _info.json, else numbers; None where there are no labels."""
    count = int(index.labels.max()) + 1
    if count == 0:
        return None
    file = root / "classes.txt"
    try:
        listed = file.read_text(encoding="utf-8").split("\n") if file.is_file() else told.get("class_names") or []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): write it again, in UTF-8") from error
    classes = tuple(str(name).strip() for name in listed if str(name).strip())
    if classes and len(classes) < count:
        at = int(np.argmax(index.labels))
        raise ConfigError(f"{root} names {len(classes)} classes but {names[index.shards[at]]} has the label {count - 1}: name every class")
    return classes or tuple(str(label) for label in range(count))
