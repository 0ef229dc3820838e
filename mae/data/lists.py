"""A list of image files, a line each, with or without a label: for data that other programs have chosen or split."""

import re
from pathlib import Path

import numpy as np

from mae.data.folder import HELD_OUT, LIST, Folder, Kind, check_writable, with_test_share
from mae.data.sources import Opened
from mae.errors import ConfigError
from mae.keys import Data

SHOWN = 3  # missing files that are named


def open_list(file: Path, data: Data, kind: Kind) -> Opened:
    """The images of a list, in its order. A line is PATH, or PATH LABEL; the path is relative to the list, or absolute.

    What follows the file's extension (or a tab) is the label, a name or a number. train.txt with test.txt, val.txt or validation.txt
    beside it are the splits, as folders of these names are; otherwise a fixed fifth is for testing. Raises ConfigError for files that are
    not there, for lines without a label among labelled ones, and for held-out labels that no training image has.
    """
    train = read_list(file, kind)
    beside = [file.with_name(name + LIST) for name in HELD_OUT]
    lists = [train, *(read_list(other, kind) for other in beside if file.stem == "train" and other.is_file())]
    classes = _classes(train[1])
    for number, (_, labels) in enumerate(lists[1:]):
        unknown = sorted(set(labels or ()) - set(classes or ()))
        if classes is not None and (labels is None or unknown):
            what = f"has the label {unknown[0]!r}, which" if unknown else "has no labels, but"
            raise ConfigError(f"{beside[number]} {what} {file} has {'not' if unknown else 'some'}: give both the same classes")
    sources = [_source(file.parent, paths, labels, classes, data.channels, kind) for paths, labels in lists]
    if len(sources) == 1:
        return with_test_share(sources[0], data)
    return Opened(train=sources[0], test=sources[1], validation=sources[2] if len(sources) > 2 else None)


def read_list(file: Path, kind: Kind) -> tuple[list[str], list[str] | None]:
    """Paths, and labels where the lines have some. Raises ConfigError as `open_list`."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): make it readable") from error
    lines = [line.strip() for line in text.split("\n")]
    found = [_parts(line, file, kind.extensions) for line in lines if line]
    paths, labels = [path for path, _ in found], [label for _, label in found if label]
    if not paths:
        raise ConfigError(f"{file} lists no images: write a path a line, and after it a label where there are labels")
    if 0 < len(labels) < len(paths):
        bare = next(path for path, label in found if not label)
        raise ConfigError(f"{file}: {bare} has no label but others have one: add it, or remove all")
    missing = [path for path in paths if not (file.parent / path).is_file()]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ConfigError(
            f"{file} lists files that are not there, {', '.join(missing[:SHOWN])}{more}: paths are relative to the list's folder"
        )
    return paths, labels or None


def _parts(line: str, file: Path, extensions: tuple[str, ...]) -> tuple[str, str]:
    """Path and label of a line; no label: an empty one."""
    path, tab, label = line.partition("\t")
    if tab or line.lower().endswith(extensions):
        return path.strip(), label.strip()
    match = re.fullmatch(rf"(.+(?:{'|'.join(map(re.escape, extensions))}))\s+(\S.*)", line, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{file}: the line {line[:80]!r} is neither PATH nor PATH LABEL, with a path in {', '.join(extensions)}")
    return match[1], match[2]


def _classes(labels: list[str] | None) -> tuple[str, ...] | None:
    """The labels there are, numbers by size; None where they say nothing. Raises ConfigError as `check_writable`."""
    names = set(labels or ())
    check_writable(names)
    if len(names) < 2:
        return None
    return tuple(sorted(names, key=(int if all(re.fullmatch(r"\d{1,18}", name) for name in names) else str)))


def _source(root: Path, paths: list[str], labels: list[str] | None, classes: tuple[str, ...] | None, channels: int, kind: Kind) -> Folder:
    number = {name: i for i, name in enumerate(classes or ())}
    known = None if classes is None else np.array([number[label] for label in labels or ()], np.int64)
    return Folder(root, paths, classes, channels, kind=kind, labels=known)
