"""The story of shards: any images as tar files that are read fast and from anywhere, each checked before it counts."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mae import config
from mae.commands import door, options
from mae.config import Config
from mae.data import index, shard_folder, substitute, write
from mae.data.encode import Encoder
from mae.data.folder import HELD_OUT, Folder, find_images
from mae.data.shards import UNFINISHED, Shards, check_sequence, split_of
from mae.data.sources import Source, Subset, cache_folder, open_parts
from mae.data.verify import check_all
from mae.data.write import Facts, Shard, Workers
from mae.errors import ConfigError, LostContact, Preempted
from mae.training.signals import Stop

USAGE = """
usage: mae shard SRC DST [--resize PIXELS] [--quality Q] [--per-shard N] [--workers N] [data.damage=SHARE]
       mae shard DATA DST ...     DATA: configs/data/NAME.yaml, data.key=value ...
       mae shard --verify DST [--workers N]

Writes the images of SRC, a folder (of classes or not, of train, val and test or not) or what the words of a `data` section say, as tar
shards in webdataset layout, which training reads with data.name=shards data.path=DST, and timm and webdataset too:
  train-000000.tar ...  KEY.jpg|png|webp and KEY.cls; KEY is the image's path without its extension. Also val- and test- where SRC has them
  _info.json            counts, shards and classes, as timm reads them
  _index.npz            where every image lies, and every shard's SHA-256
  damaged.txt           what could not be read and was left out
Every file is kept byte for byte, or with --resize scaled down and written as JPEG. The images of a split are spread over its shards in a
fixed mixed order. What is stopped goes on when the same command is run again. At the end all shards are read back. Where more than a
share data.damage of the images is unreadable the exit code is 2.

  --resize PIXELS   whole number (none: byte for byte): the shorter side, which larger images are scaled down to
  --quality Q       whole number, 1 to 100 (90): of the JPEGs that --resize writes
  --per-shard N     whole number (1000): images
  --workers N       whole number (the machine's processors): processes
  --verify          reads any shards back, and does nothing else
"""
OPTIONS = {"resize": None, "quality": 90, "per-shard": 1000, "workers": None}
DAMAGED = "damaged.txt"
WAYS = {"untouched": "byte for byte", "resized": "scaled down", "converted": "converted to PNG, as shards hold JPEG, PNG and WebP"}
SHOWN = 20  # damaged images on the screen
FORMAT = 1  # of what is written: other numbers are other bytes


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=("data",))


def _story(words: list[str]) -> None:
    flags, numbers, _, words = options.pick(words, ("verify",), OPTIONS)
    if not 1 <= (numbers["quality"] or 0) <= 100:
        raise ConfigError(f"--quality {numbers['quality']} is not possible: JPEG has 1 to 100")
    arguments, words = config.split_words(words)
    configured = config.names(words, "data")
    expected = 1 if configured or flags else 2
    workers = numbers["workers"] or _processors()
    if flags and len(arguments) == 1 and not configured:
        options.only(words, ("data.damage",), "what lies there")
        return _verify(_existing(arguments[0]), workers, config.load(words).data.damage)
    if len(arguments) != (1 if configured else 2):
        what = "DST" if expected == 1 else "SRC and DST"
        raise ConfigError(f"say which images and where to, {what}: mae shard SRC DST, or mae shard configs/data/NAME.yaml DST")
    target = Path(arguments[-1]).expanduser()
    cfg = config.load(words) if configured else _of_folder(Path(arguments[0]).expanduser(), target, words)
    _write(cfg, target, workers, numbers)
    return None


def _processors() -> int:
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has no such thing


def _seconds() -> float:
    """Between two looks of a bar: few of them fill the log of a job."""
    return 0.1 if sys.stderr.isatty() else 30.0


def _existing(word: str) -> Path:
    folder = Path(word).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give the one that holds the shards")
    return folder


def _of_folder(source: Path, target: Path, words: list[str]) -> Config:
    options.only(words, ("data.damage",), "the folder")
    if not source.exists():
        raise ConfigError(f"{source} does not exist: give the folder that holds the images")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside {source}, whose images it would join: choose a folder elsewhere")
    cfg = config.load(words)
    name = "shards" if source.is_dir() and next(source.rglob("*.tar"), None) else "folder"
    if name == "shards" and (images := find_images(source)):
        raise ConfigError(
            f"{source} holds .tar files and images ({images[0]}): say which with configs/data/shards.yaml data.path={source} or folder.yaml"
        )
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name=name, path=str(source), channels=3))


def _write(cfg: Config, target: Path, workers: int, numbers: dict[str, Any]) -> None:
    sources = _splits_of(cfg)
    plan = {"format": FORMAT, "sources": {split: source.fingerprint for split, source in sources.items()}}
    plan |= {name: numbers[name] for name in ("resize", "quality", "per-shard")}
    if shard_folder.made(target, plan):
        print(f"{target} was written before from these images: it is checked again")
        return _verify(target, workers, cfg.data.damage)
    shards = [shard for split, source in sources.items() for shard in write.shards_of(split, len(source), numbers["per-shard"])]
    with shard_folder.claimed(target, plan) as unfinished:
        facts = _write_shards(shards, sources, target, unfinished, workers, numbers)
        within = {shard.name: f"{shard.split}/" if len(sources) > 1 else "" for shard in shards}
        damaged = [(within[fact.name] + name, reason) for fact in facts for name, reason in fact.damaged]
        _report_damage(damaged, target, sum(len(source) for source in sources.values()), cfg.data.damage)
        parts = _read_back(target, [fact.name for fact in facts], shard_folder.written(facts), workers)
        classes = next((source.classes for source in sources.values() if source.classes is not None), None)
        shard_folder.finish(target, unfinished, shards, facts, parts, classes=classes, plan=plan, cache=cache_folder())
    how = {way: sum(fact.how.get(way, 0) for fact in facts) for way in ("untouched", "resized", "converted")}
    ways = ", ".join(f"{count:,} {WAYS[way]}" for way, count in how.items() if count)
    size = sum(fact.bytes for fact in facts) / 2**20
    left_out = f"; {len(damaged):,} damaged images left out, listed in {target / DAMAGED}" if damaged else ""
    print(f"{target}: {sum(how.values()):,} images in {len(facts):,} shards, {size:,.1f} MiB, all read back: {ways}{left_out}")
    return None


def _verify(target: Path, workers: int, budget: float) -> None:
    """Checks the shards of a folder. Raises ConfigError, after all faults are on the screen, where they are not good."""
    if (target / UNFINISHED).exists():
        raise ConfigError(f"{target} is not finished: run the `mae shard` that writes it again, which goes on where it stopped")
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*.tar"))
    published = index.read_published(target)
    known = [] if published is None else [os.fsdecode(name) for name in published["names"].tolist()]
    names = sorted({*found, *known})
    if not names:
        raise ConfigError(f"{target} holds no .tar shards: give the folder they lie in")
    check_sequence(target, found)
    parts = _read_back(target, names, published, workers, budget)
    count = sum(len(part) for part in parts)
    how = "by the checksums they were written with" if len(known) == len(names) else "by decoding every image"
    print(f"{target}: {count:,} images in {len(names):,} shards are good, checked {how}")


def _splits_of(cfg: Config) -> dict[str, Source]:
    """All images by the splits that lie there; a share that only a training run would hold out is no split."""
    train, validation, test = open_parts(cfg.data)
    if isinstance(train, Subset) and isinstance(test, Subset) and train.source is test.source:
        return {"train": train.source}
    parts = {"train": train, "validation": validation, "test": test}
    return {_split_name(part, name): part for name, part in parts.items() if part is not None}


def _split_name(part: Source, name: str) -> str:
    """How a split is called where it lies: a folder `val` is for testing where there is no `test`, but keeps its name."""
    if isinstance(part, Folder) and part.root.name in ("train", *HELD_OUT):
        return part.root.name
    if isinstance(part, Shards):
        return split_of(part.names[part.index.shards[0]])
    return name


def _write_shards(
    shards: list[Shard], sources: dict[str, Source], target: Path, unfinished: Path, workers: int, numbers: dict[str, Any]
) -> list[Facts]:
    """Those that are not there yet, with a bar of images and the time left. Raises Preempted at a signal, between two images."""
    before = {shard.name: write.finished(target, unfinished, shard.name) for shard in shards}
    todo = [shard for shard in shards if before[shard.name] is None]
    encoders = {split: Encoder(source, resize=numbers["resize"], quality=numbers["quality"]) for split, source in sources.items()}
    keys = {split: write.keys_of(sources[split]) for split in {shard.split for shard in todo}}
    total, left = (sum(shard.last - shard.first for shard in some) for some in (shards, todo))
    if left < total:
        print(f"{target}: going on, {total - left:,} of {total:,} images are there")
    stopped = f"stopped; complete shards are kept in {target}: run the same command to go on"
    bar = tqdm(total=total, initial=total - left, unit="image", smoothing=0.05, disable=not left, mininterval=_seconds())
    with Stop() as stop, bar:

        def counted(images: Iterator[Any]) -> Iterator[Any]:
            for image in images:
                if stop.asked:
                    raise Preempted(stopped)
                yield image
                bar.update()

        try:
            with Workers(min(workers, -(-left // write.CHUNK)), encoders) as pool:
                images = counted(pool.encode(todo))
                for shard in todo:
                    source = sources[shard.split]
                    before[shard.name] = write.write_shard(target, unfinished, shard, images, keys[shard.split], source.labels)
        except BrokenProcessPool as error:
            raise LostContact("a process that encodes images died, perhaps for lack of memory: run the same command to go on") from error
        except OSError as error:
            raise ConfigError(f"{target} cannot be written ({error.strerror}): make room and run the same command to go on") from error
    return [fact for fact in before.values() if fact is not None]


def _read_back(root: Path, names: list[str], published: dict[str, np.ndarray] | None, workers: int, budget: float = 0) -> list[index.Index]:
    """The index of every shard, all checked. Raises ConfigError, after all faults are on the screen, where there is one."""
    with Workers(min(workers, len(names))) as pool:
        found = list(tqdm(check_all(root, names, published, pool), total=len(names), unit="shard", desc="checking", mininterval=_seconds()))
    faults = [checked.fault for checked in found if checked.fault is not None]
    if faults:
        print("\n".join(faults), file=sys.stderr)
        raise ConfigError(f"{len(faults)} of {len(names)} shards in {root} are not good, the first: {faults[0]}")
    damaged, count = [d for checked in found for d in checked.damaged], sum(len(checked.index) for checked in found)
    print("\n".join(damaged[:SHOWN]), file=sys.stderr, end="\n" if damaged else "")
    if len(damaged) > budget * count:
        raise ConfigError(f"{len(damaged)} of {count:,} images in {root} cannot be read, more than data.damage={budget:g}")
    return [checked.index for checked in found]


def _report_damage(damaged: list[tuple[str, str]], target: Path, count: int, budget: float) -> None:
    """Names what is left out, in a file and on the screen. Raises ConfigError where it is more than a share `budget` of all images."""
    if not damaged:
        return
    file = target / DAMAGED
    write.write_text(file, "".join(f"{name}\t{reason}\n" for name, reason in damaged))
    for name, reason in damaged[:SHOWN]:
        print(f"{name} cannot be read: {reason}; left out", file=sys.stderr)
    if len(damaged) > SHOWN:
        print(f"... and {len(damaged) - SHOWN:,} more, listed in {file}", file=sys.stderr)
    if not substitute.within(len(damaged), count, budget):
        enough = f"{1.1 * len(damaged) / count:.2g}"
        raise ConfigError(
            f"{len(damaged):,} of {count:,} images cannot be read, more than data.damage={budget:g} (listed in {file}): repair them and "
            f"begin again in another folder, or run the same command with data.damage={enough}, which leaves them out"
        )
