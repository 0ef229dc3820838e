"""Where every image of some tar shards lies: made once by walking the archives, mapped from a file ever after.

Ten million images take no memory and no time to open: the columns are NumPy files in the user's cache folder, of which the
operating system fetches the pages that are looked at, once for all ranks and workers of a machine.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae.data import tar
from mae.data.sources import fingerprint, name_hashes
from mae.errors import ConfigError

IMAGES = ("jpg", "jpeg", "png", "webp")
PUBLISHED = "_index.npz"  # beside the shards, written by `mae shard`
VERSION = 2
WALKERS = 8  # shards walked at once: on a network a walk is waiting
ANNOUNCED = 50  # shards from which on a walk is announced


@dataclass(frozen=True)
class Index:
    """Columns of length N, in the order of shards and of offsets in them; `digests` has one entry a shard."""

    shards: np.ndarray  # which shard, int64
    offsets: np.ndarray  # bytes, int64
    sizes: np.ndarray  # bytes, int64
    labels: np.ndarray  # int64, -1 = no .cls
    hashes: np.ndarray  # int64, of shard and key
    keys: np.ndarray  # what names the image in its shard, bytes
    digests: np.ndarray  # (shards,) int64: a hash of a shard's keys, sizes and labels
    origin: tuple[Path, tuple[int, ...] | None] | None = None  # the folder of the columns, and the shards chosen from it

    def __len__(self) -> int:
        return len(self.keys)

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that gets it opens the files itself: nothing is copied."""
        return (_reopen, self.origin) if self.origin is not None else (Index, tuple(getattr(self, f.name) for f in fields(self)))

    def of_shards(self, numbers: list[int]) -> "Index":
        """The rows of some shards (ascending); of neighbouring ones without copying."""
        first, last = np.searchsorted(self.shards, [numbers[0], numbers[-1] + 1]) if numbers else (0, 0)
        rows: Any = slice(first, last)
        if numbers and len(numbers) <= numbers[-1] - numbers[0]:
            rows = np.flatnonzero(np.isin(self.shards, numbers))
        origin = None if self.origin is None else (self.origin[0], tuple(numbers))
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS}, digests=self.digests[numbers], origin=origin)


COLUMNS = tuple(f.name for f in fields(Index))[:-2]
ARRAYS = (*COLUMNS, "digests")


def cached_index(root: Path, names: list[str], cache: Path) -> Index:
    """The index of the shards `names` under root, from the folder `cache` where the shards' names, sizes and times are still the same.

    Raises ConfigError for a damaged or unsafe shard, and for one that is not as `mae shard` wrote it.
    """
    folder = place_of(root, names, cache)
    try:
        return load(folder)
    except (OSError, ValueError):  # not there, or damaged
        index = make_index(root, names)
    return store(folder, index)


def place_of(root: Path, names: list[str], cache: Path) -> Path:
    """The folder in `cache` of the index of these shards as they are now. Raises ConfigError where one is a link to nowhere."""
    try:
        stats = [(name, status.st_size, status.st_mtime_ns) for name in names for status in [(root / name).stat()]]
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be opened ({error.strerror}): copy it again or move it out of data.path") from error
    return cache / f"shards-{hashlib.blake2b(json.dumps([VERSION, stats]).encode(), digest_size=16).hexdigest()}"


def make_index(root: Path, names: list[str]) -> Index:
    """Walks all shards. Raises ConfigError for a damaged or unsafe one, an unreadable label, and one that is not as it was written."""
    if len(names) >= ANNOUNCED:
        logging.getLogger("mae").info("indexing %d shards in %s, once", len(names), root)
    published = read_published(root)
    with ThreadPoolExecutor(WALKERS) as walkers:
        parts = list(walkers.map(partial(_walk, root, published), names))
    return join(parts)


def join(parts: list[Index]) -> Index:
    """The index of shards 0, 1, ... from those of each."""
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    columns["shards"] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Index(**columns, origin=None)


def index_of_shard(path: Path, name: str) -> Index:
    """The index of one archive, `name` being its path under the root. Raises ConfigError as `make_index`."""
    rows = list(_samples(path))
    offsets, sizes, labels = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    keys = [os.fsencode(row[3]) for row in rows]
    hashes = name_hashes([f"{name}/{row[3]}" for row in rows], 0)
    digest = np.array([int(fingerprint(os.fsdecode(b"\n".join(keys)), sizes, labels), 16)], np.uint64).astype(np.int64)
    return Index(np.zeros(len(rows), np.int64), offsets, sizes, labels, hashes, np.array(keys, dtype=None if keys else "S1"), digest)


def load(folder: Path) -> Index:
    """A stored index, mapped, not read. Raises OSError or ValueError where it is not there or damaged."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    if len({len(arrays[name]) for name in COLUMNS}) != 1:
        raise ValueError(f"{folder} is damaged")
    return Index(**arrays, origin=(folder, None))


def store(folder: Path, index: Index) -> Index:
    """Writes the index whole or not at all and maps it; a cache that cannot be written only costs time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name in ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(index, name))
            try:
                return load(folder)  # another rank was faster, and its readers may be opening it
            except (OSError, ValueError):
                shutil.rmtree(folder, ignore_errors=True)  # damaged
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return load(folder)
    except (OSError, ValueError):
        return index


def publish(file: Path, index: Index, shards: dict[str, np.ndarray]) -> None:
    """Writes the index as one file for others, with every shard's `names`, length in `bytes` and `sha256`."""
    with open(file, "wb") as stream:
        arrays = {name: getattr(index, name) for name in ARRAYS} | shards
        np.savez(stream, **arrays)


def read_published(root: Path) -> dict[str, np.ndarray] | None:
    """The arrays that `publish` wrote beside the shards: names, bytes, sha256 and the columns. None where there is none."""
    try:
        with np.load(root / PUBLISHED, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in (*ARRAYS, "names", "bytes", "sha256")}
        if len({len(arrays[name]) for name in ("names", "bytes", "sha256", "digests")}) > 1 or arrays["names"].dtype.kind != "S":
            raise ValueError("its columns do not belong together")
        return arrays
    except FileNotFoundError:
        return None
    except Exception as error:  # zip files raise a dozen kinds
        raise ConfigError(
            f"{root / PUBLISHED} is damaged ({error}): copy it again, or remove it to have the shards indexed here"
        ) from error


def check_length(path: Path, name: str, published: dict[str, np.ndarray] | None) -> int | None:
    """The shard's number in a published index, None where it is not in it. Raises ConfigError where its length is another."""
    if published is None:
        return None
    at = np.flatnonzero(published["names"] == os.fsencode(name))
    if not len(at):
        return None
    expected, found = int(published["bytes"][at[0]]), path.stat().st_size
    if expected != found:
        what = f"cut short at byte {found}: it has" if found < expected else "too long: it should have"
        raise ConfigError(f"{path} is {what} {expected:,} bytes in {PUBLISHED}: copy or write it again, or remove {PUBLISHED}")
    return int(at[0])


def _walk(root: Path, published: dict[str, np.ndarray] | None, name: str) -> Index:
    number = check_length(root / name, name, published)
    part = index_of_shard(root / name, name)
    if published is not None and number is not None and part.digests[0] != published["digests"][number]:
        raise ConfigError(
            f"{root / name} is damaged or was changed: it has other members in {PUBLISHED}; copy or write it again, or remove {PUBLISHED}"
        )
    return part


def _reopen(folder: Path, numbers: tuple[int, ...] | None) -> Index:
    index = load(folder)
    return index if numbers is None else index.of_shards(list(numbers))


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
            if not re.fullmatch(rb"\d{1,7}", text):
                raise ConfigError(
                    f"{path}: {member.name} at byte {member.offset} holds {text[:20]!r}, a label is the number of a class, 0 to 9999999"
                )
            labels[key] = int(text)
    for key, member in images.items():
        yield member.offset, member.size, labels.get(key, -1), member.name
