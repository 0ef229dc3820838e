"""Checks tar shards from end to end: every header, every length, and every byte or, where no checksum was written, every image."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.decode import DamagedImage
from mae.data.index import Index, check_length, index_of_shard
from mae.data.shards import Shards
from mae.data.write import Workers
from mae.errors import ConfigError


@dataclass(frozen=True)
class Checked:
    """What was found in a shard."""

    index: Index
    damaged: list[str]  # sentences, of images
    fault: str | None  # why the shard as a whole is not good


def check_all(root: Path, names: Iterable[str], published: dict[str, np.ndarray] | None, workers: Workers) -> Iterator[Checked]:
    """Every shard under root in order. `published`: the index that was written beside them, if there is one."""
    known = None if published is None else {name: published[name] for name in ("names", "bytes", "sha256")}  # the rest is long
    return workers.run(partial(check, root, known), names)


def check(root: Path, published: dict[str, Any] | None, name: str) -> Checked:
    """One shard: against its checksum where one was written, else by decoding every image."""
    none = np.zeros(0, np.int64)
    nothing = Index(none, none, none, none, none, np.zeros(0, "S1"), np.zeros(1, np.int64))
    try:
        number = check_length(root / name, name, published)
        index = index_of_shard(root / name, name)
    except (ConfigError, OSError) as error:
        return Checked(nothing, [], str(error))
    if published is None or number is None:
        return Checked(index, list(_unreadable(Shards(root, [name], index, None, 3))), None)
    with open(root / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest.encode() != published["sha256"][number]:
        return Checked(index, [], f"{root / name} is damaged: it has another SHA-256 than when it was written, copy or write it again")
    return Checked(index, [], None)


def _unreadable(source: Shards) -> Iterator[str]:
    for index in range(len(source)):
        try:
            source.read(index)
        except DamagedImage as error:
            yield str(error)
