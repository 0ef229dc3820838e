"""timm's `_info.json` beside tar shards: which shards make which split, and how many images each of them holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae.errors import ConfigError

FILE = "_info.json"
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def read(root: Path) -> dict[str, Any]:
    """The content of the file under root; empty where there is none. Raises ConfigError where it is no such file."""
    try:
        content = json.loads((root / FILE).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{root / FILE} cannot be read ({error}): copy it again, or remove it") from error
    splits = content.get("splits", {}) if isinstance(content, dict) else None
    if not isinstance(splits, dict) or not all(isinstance(facts, dict) and _is_split(facts) for facts in splits.values()):
        raise ConfigError(f"{root / FILE} is not timm's, whose splits have filenames and shard_lengths: write it again, or remove it")
    if not _all(content.get("class_names", []), str):
        raise ConfigError(f"{root / FILE} has class_names that are no list of names: write it again, or remove it")
    return dict(content)


def _is_split(facts: dict[str, Any]) -> bool:
    return _all(facts.get("filenames", []), str) and _all(facts.get("shard_lengths", []), int)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def splits_of(info: Mapping[str, Any]) -> dict[str, str]:
    """Shard name -> train | val | test, of the shards in splits of these names."""
    return {
        name: SPLITS[split] for split, facts in info.get("splits", {}).items() if split in SPLITS for name in facts.get("filenames", [])
    }


def missing(info: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The shards of a split that is there in part; one that was not copied at all is not missed."""
    there = set(names)
    listed = [facts.get("filenames", []) for facts in info.get("splits", {}).values()]
    return [name for split in listed if there & set(split) for name in split if name not in there]


def check_lengths(info: Mapping[str, Any], root: Path, names: Sequence[str], shards: np.ndarray) -> None:
    """Raises ConfigError for a shard with another number of images than the file says.

    `shards`: (N,) int64, ascending, the number (in `names`) of the shard that each image is in.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for facts in info.get("splits", {}).values():
        for name, length in zip(facts.get("filenames", []), facts.get("shard_lengths", []), strict=False):
            if name not in numbers:
                continue
            ends = np.searchsorted(shards, np.array([0, 1]) + numbers[name])  # a count would read the whole column
            if (found := int(ends[1] - ends[0])) != length:
                raise ConfigError(f"{root / name} holds {found} images but {FILE} says {length}: copy or write it again, or remove {FILE}")
