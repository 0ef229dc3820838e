"""The folder that shards are written to: claimed by one process, finished or not, and described when it is."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mae.data import index, info
from mae.data.shards import UNFINISHED
from mae.data.write import Facts, Shard, write_text
from mae.errors import ConfigError


def made(target: Path, plan: dict[str, Any]) -> bool:
    """Whether the target is complete and was written by this plan. Raises ConfigError where it holds something else."""
    if not target.exists() or (target / UNFINISHED).exists():
        return False
    if target.is_dir() and not any(target.iterdir()):
        return False
    if not target.is_dir() or info.read(target).get("plan") != plan:
        raise ConfigError(f"{target} exists already and holds other things: choose another folder for the shards, or remove it")
    return True


@contextmanager
def claimed(target: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The folder of what is not finished, for this process alone.

    Raises ConfigError where another process writes there, or another plan was begun.
    """
    unfinished = target / UNFINISHED
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        lock = open(unfinished / "lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"{target} cannot be made ({error.strerror}): choose a folder that you may write to") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process is writing {target}: wait for it, or stop it") from error
        file = unfinished / "plan.json"
        if file.exists() and json.loads(file.read_text()) != plan:
            raise ConfigError(f"{target} was begun from other images or with other options: use those again, or remove it")
        write_text(file, json.dumps(plan))
        yield unfinished


def written(facts: Sequence[Facts]) -> dict[str, np.ndarray]:
    """What a published index says of the shards as wholes."""
    lengths, sha256 = np.array([fact.bytes for fact in facts]), np.array([fact.sha256 for fact in facts], "S64")
    return {"names": np.array([fact.name.encode() for fact in facts]), "bytes": lengths, "sha256": sha256}


def finish(
    target: Path,
    unfinished: Path,
    shards: Sequence[Shard],
    facts: Sequence[Facts],
    parts: Sequence[index.Index],
    *,
    classes: Sequence[str] | None,
    plan: dict[str, Any],
    cache: Path,
) -> None:
    """Writes the index and timm's _info.json beside the shards, then takes the mark of the unfinished away. `parts`: the index of each."""
    order = np.argsort([fact.name for fact in facts])  # as they are listed when they are opened
    names = [facts[i].name for i in order]
    whole = index.join([parts[i] for i in order])
    index.publish(unfinished / index.PUBLISHED, whole, written([facts[i] for i in order]))
    os.replace(unfinished / index.PUBLISHED, target / index.PUBLISHED)
    splits: dict[str, Any] = {}
    for fact, shard in zip(facts, shards, strict=True):
        split = splits.setdefault(shard.split, {"name": shard.split, "num_samples": 0, "filenames": [], "shard_lengths": []})
        split["num_samples"] += fact.images
        split["filenames"].append(fact.name)
        split["shard_lengths"].append(fact.images)
    named = {} if classes is None else {"class_names": list(classes)}
    write_text(target / info.FILE, json.dumps({"splits": splits, **named, "plan": plan}, indent=1) + "\n")
    index.store(index.place_of(target, names, cache), whole)
    shutil.rmtree(unfinished)
