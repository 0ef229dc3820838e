"""Writes a source as tar shards in webdataset layout: the same bytes whatever the number of workers and however often it was stopped.

Shard k of a split holds images [k * per_shard, (k + 1) * per_shard) of a fixed keyed permutation of the split, so that every shard
is a draw from all classes, also of a folder that is sorted by them, and none depends on the shards before it. A shard takes its name
when it is complete; what is known of it lies beside it, in .unfinished, until all are there.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mae.data.decode import DamagedImage
from mae.data.encode import Encoded, Encoder
from mae.data.order import permute
from mae.data.sources import Source
from mae.data.worker import context, serve

CHUNK = 16  # images that a worker is given at a time
AHEAD = 4  # such chunks waiting for each worker


class Facts(NamedTuple):
    """What is known of a finished shard."""

    name: str
    bytes: int
    sha256: str
    images: int
    how: dict[str, int]  # images by what was done to them: untouched, resized, converted
    damaged: list[list[str]]  # [name, reason] of what was left out


@dataclass(frozen=True)
class Shard:
    """A shard to be written: images [first, last) of the permuted split of `count`."""

    name: str
    split: str
    first: int
    last: int
    count: int

    @property
    def positions(self) -> np.ndarray:
        """(last - first,) int64, in the split's source."""
        return permute(np.arange(self.first, self.last), self.count, 0)


def shards_of(split: str, count: int, per_shard: int) -> list[Shard]:
    """All shards of a split of `count` images."""
    starts = range(0, count, per_shard)
    return [Shard(f"{split}-{k:06}.tar", split, start, min(start + per_shard, count), count) for k, start in enumerate(starts)]


def write_shard(
    folder: Path, unfinished: Path, shard: Shard, encoded: Iterator[Encoded | DamagedImage], keys: list[str], labels: np.ndarray | None
) -> Facts:
    """Writes folder/NAME whole, from its images in order; `keys` and `labels` are the split's. Raises OSError."""
    from webdataset import TarWriter  # torch comes with it

    part = unfinished / f"{shard.name}.part"
    how: dict[str, int] = {}
    damaged: list[list[str]] = []
    with open(part, "wb") as file:
        hashing = _Hashing(file)
        with TarWriter(hashing, encoder=False, mtime=0) as writer:  # no time of day: the same images, the same bytes
            for position, image in zip(shard.positions.tolist(), encoded, strict=False):  # those of the shards to come follow
                if isinstance(image, DamagedImage):
                    damaged.append([image.name, image.reason])
                    continue
                sample = {"__key__": keys[position], image.extension: image.content}
                writer.write(sample if labels is None else sample | {"cls": b"%d" % labels[position]})
                how[image.how] = how.get(image.how, 0) + 1
        file.flush()
        os.fsync(file.fileno())
    facts = Facts(shard.name, hashing.bytes, hashing.sha256.hexdigest(), sum(how.values()), how, damaged)
    write_text(unfinished / f"{shard.name}.json", json.dumps(facts._asdict()))
    os.replace(part, folder / shard.name)
    return facts


def finished(folder: Path, unfinished: Path, name: str) -> Facts | None:
    """What is known of a shard that was written before, None where it has to be written: also where it was cut since."""
    try:
        facts = Facts(**json.loads((unfinished / f"{name}.json").read_text()))
        return facts if (folder / name).stat().st_size == facts.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def write_text(file: Path, text: str) -> None:
    """Replaces a small file in one step, on the disk before it has its name."""
    temporary = file.with_name(f"{file.name}.part")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def keys_of(source: Source) -> list[str]:
    """A key for every image: its path without the extension; dots, which end a key in webdataset, become _; no two are the same.

    Of a path that begins above its folder (../x/1.png in a list) what follows: no shard holds names that lead out.
    """
    keys: list[str] = []
    seen: set[str] = set()
    for number in range(len(source)):
        path = source.name_of(number).rpartition(".tar/")[2]
        *steps, base = path.split("/")
        stem = (base.rpartition(".")[0] or base).replace(".", "_")
        key = "/".join([*(step for step in steps if step not in ("", ".", "..")), stem])
        while key in seen:
            key = f"{key}-{number}"
        keys.append(key)
        seen.add(key)
    return keys


class Workers:
    """Processes (for a count of 1 this one) that work on jobs, whose results come in the order of the jobs and never many ahead."""

    def __init__(self, count: int, encoders: Mapping[str, Encoder] = MappingProxyType({})) -> None:
        """`encoders`: those of the splits, sent to every process once."""
        self.count, self.encoders = count, dict(encoders)

    def __enter__(self) -> "Workers":
        self.pool: ProcessPoolExecutor | None = None
        if self.count > 1:
            self.pool = ProcessPoolExecutor(self.count, context("mae.data.write"), _begin, (self.encoders, True))
        else:
            _begin(self.encoders, False)
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """work(job) of every job, in order. Raises what `work` raises, BrokenProcessPool where a process died."""
        if self.pool is None:
            yield from map(work, jobs)
            return
        waiting: deque[Future[Any]] = deque()
        for job in jobs:
            waiting.append(self.pool.submit(work, job))
            if len(waiting) >= AHEAD * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def encode(self, shards: Iterable[Shard]) -> Iterator[Encoded | DamagedImage]:
        """All images of the shards, one after the other."""
        jobs = ((s.split, chunk) for s in shards for at in [s.positions] for chunk in np.split(at, range(CHUNK, len(at), CHUNK)))
        for chunk in self.run(_encode, jobs):
            yield from chunk


_encoders: dict[str, Encoder] = {}


def _begin(encoders: dict[str, Encoder], apart: bool) -> None:
    """What a process does first; `apart`: it is not the main one."""
    _encoders.update(encoders)
    if apart:
        serve(0)


def _encode(job: tuple[str, np.ndarray]) -> list[Encoded | DamagedImage]:
    split, positions = job
    results: list[Encoded | DamagedImage] = []
    for position in positions.tolist():
        try:
            results.append(_encoders[split](position))
        except DamagedImage as error:
            results.append(DamagedImage(error.name, error.reason))  # without the traceback, which would cross processes
    return results


class _Hashing:
    """What is written to a file, counted and hashed on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.bytes += len(content)
        self.sha256.update(content)
        return self.file.write(content)
