"""The story of fine-tuning: an encoder and a protocol -> data -> a classifier -> its test accuracy beside the run's other results."""

import functools
from collections.abc import Sequence

from mae.commands import door, encoders
from mae.data.sources import open_splits
from mae.training import schedule
from mae.training.run import RunFolder

USAGE = """
usage: finetune.py ENCODER [configs/evaluation/finetune_paper.yaml] [section.key=value ...]

Trains a classifier from an encoder, all weights: the folder of a pretraining run, a checkpoint file, timm:NAME or hf:NAME. The images are
those of the run, or others: configs/data/X.yaml data.path=DIR.
configs/evaluation/finetune_official_repo.yaml is the official repository's variant of the recipe.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    tell = functools.partial(story, kind="finetune", default="finetune_paper")
    return door.enter(tell, USAGE, words, protocol="finetune_paper", of_encoder=True)


def story(words: list[str], kind: str, default: str) -> None:
    """Reads the words of a supervised command and trains; `default` is its protocol where the words name none."""
    cfg, encoder = encoders.supervised(words, kind=kind, default=default)
    protocol = cfg.protocol["name"]
    path = cfg.run.dir or f"{encoder.home.path}/{protocol.replace('/', '-')}" + (f"-s{cfg.train.seed}" if cfg.train.seed else "")
    folder = RunFolder(path)
    folder.check(cfg)
    splits = open_splits(cfg.data)
    encoders.require_labels(cfg, splits)
    plan = schedule.plan(cfg, len(splits.train))
    if folder.state() == "done":
        print(f"{folder.path} is finished:\n{folder.results.read_text()}")
        return

    from mae.commands.supervised import train_classifier  # torch and timm: only once words and data are known to be good

    train_classifier(cfg, folder, splits, plan, encoder=encoder)
