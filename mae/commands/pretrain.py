"""The story of pretraining: words -> configuration -> data -> method -> training -> evaluation -> a folder of results."""

import contextlib
import json
from collections.abc import Sequence

from mae import config
from mae.commands import door
from mae.config import Config
from mae.data.decode import DamagedImage
from mae.data.sources import Source, open_splits
from mae.errors import ConfigError
from mae.training import schedule
from mae.training.run import RunFolder, default_folder

USAGE = """
usage: pretrain.py [FILE.yaml ...] [section.key=value ...]

Pretrains an image encoder without labels and measures what it is worth. Without words: a masked autoencoder on the
handwritten digits inside scikit-learn, in about two minutes. The same command again resumes, or shows the results.

  pretrain.py configs/data/folder.yaml data.path=DIR train.epochs=100
  torchrun --nproc-per-node 8 pretrain.py configs/recipes/mae_vit_base_in1k.yaml data.path=/data/imagenet
"""
LOOKED_AT = 16  # training images


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words)


def _story(words: list[str]) -> None:
    cfg = config.load(words)
    arguments, _ = config.split_words(words)
    if arguments:
        raise ConfigError(f"{arguments[0]!r} is neither a .yaml file nor an override: write section.key=value")
    folder = RunFolder(default_folder(cfg))
    folder.check(cfg)
    if folder.state() == "done":
        from mae.reporting import table

        print(f"{folder.path} is finished:\n")
        print(table.text(json.loads(folder.results.read_text())))
        return
    splits = open_splits(cfg.data)
    _check_probabilities(cfg, splits.train)
    plan = schedule.plan(cfg, len(splits.train))

    from mae.commands.pretraining import pretrain  # torch and timm: only once the words and the data are known to be good

    pretrain(cfg, folder, splits, plan)


def _check_probabilities(cfg: Config, images: Source) -> None:
    """Raises ConfigError where the loss takes pixels as probabilities and an array, which comes as it is, leaves [0, 1]."""
    if cfg.method.get("loss") != "bce" or cfg.data.name != "arrays":
        return
    for i in range(min(len(images), LOOKED_AT)):
        with contextlib.suppress(DamagedImage):  # is answered, and replaced, in training
            pixels = images.read(i)
            low, high = float(pixels.min()), float(pixels.max())
            if low < 0 or high > 1:
                found = f"{images.name_of(i)} holds {low if low < 0 else high:g}"
                raise ConfigError(
                    f"method.loss=bce takes pixels in [0, 1], but {found}: scale the arrays to [0, 1], or choose another loss"
                )
