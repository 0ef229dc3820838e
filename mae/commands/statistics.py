"""The story of statistics: mean and standard deviation of every channel of the training images, as a file that other commands take."""

import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from mae import config
from mae.commands import door, options
from mae.data.sources import open_splits
from mae.errors import ConfigError, LostContact
from mae.keys import public

USAGE = """
usage: mae statistics [FILE.yaml ...] [data.key=value ...] --out F.yaml

Reads every training image of the data that the words name, at its own size, and writes F.yaml with data.channels, data.mean and
data.std, to be given after them to any command:

  mae statistics configs/data/arrays.yaml data.path=DIR data.channels=13 --out DIR.yaml
  pretrain.py configs/data/arrays.yaml data.path=DIR DIR.yaml

Held-out images are left out. data.workers processes read; the figures do not depend on how many.

  --out F.yaml   a new file
"""
FLAT = 1e-6  # a standard deviation below which a channel says nothing


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=("data",))


def _story(words: list[str]) -> None:
    given, words = options.take(words, "out")
    target = Path(given["out"]).expanduser()
    if target.suffix != ".yaml" or target.exists():
        raise ConfigError(f"{target} {'exists already' if target.exists() else 'does not end in .yaml'}: choose another name")
    arguments, words = config.split_words(words)
    if arguments:
        raise ConfigError(f"{arguments[0]!r} is neither a .yaml file nor an override: write section.key=value")
    cfg = config.load(words)
    channels = cfg.data.channels
    data = dataclasses.replace(cfg.data, mean=[0.0] * channels, std=[1.0] * channels)  # what is not known yet
    train = open_splits(data).train

    from mae.data.statistics import TOGETHER, join, pixel_moments

    parts = tqdm(pixel_moments(train, channels, data.workers), total=-(-len(train) // TOGETHER), unit=f"{TOGETHER} images", disable=None)
    try:
        found = join(parts)
    except BrokenProcessPool as error:
        raise LostContact("a process that reads images died, perhaps for lack of memory: lower data.workers") from error
    for name in found.damaged:
        print(f"left out, cannot be read: {name}", file=sys.stderr)
    if not found.images:
        raise ConfigError(f"none of the {len(train)} images in {public(data.path) or data.name} can be read: check data.path")
    flat = [i for i, std in enumerate(found.std.tolist()) if std < FLAT]
    if flat:
        print(
            f"channels {', '.join(map(str, flat))} (from 0) are the same everywhere: they say nothing, their std is set to 1",
            file=sys.stderr,
        )
    mean, std = found.mean.tolist(), [1.0 if i in flat else x for i, x in enumerate(found.std.tolist())]
    text = "\n".join(
        [
            f"# Of {found.images:,} training images ({found.pixels:,} pixels) in {public(data.path) or data.name}, by mae statistics.",
            "data:",
            f"  channels: {channels}",
            f"  mean: [{', '.join(f'{x:.8g}' for x in mean)}]",
            f"  std: [{', '.join(f'{x:.8g}' for x in std)}]",
        ]
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n")
    print(f"{text}\n\n{target}: add it to the words, after those that name the data")
