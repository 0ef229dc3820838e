"""The story of the linear probe: from features extracted once (quick), or with augmentation as in the paper."""

from collections.abc import Sequence

from mae.commands import door, encoders, evaluate, finetune
from mae.data.sources import open_splits

USAGE = """
usage: linear_probe.py ENCODER [configs/evaluation/linear_probe_paper.yaml] [section.key=value ...]

Trains a linear classifier on a frozen encoder: the folder of a run, a checkpoint file, timm:NAME or hf:NAME. Without a file:
linear_probe_quick, all learning rates at once over features extracted once. linear_probe_paper runs the encoder on augmented images
in every epoch, with LARS.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, protocol="linear_probe_quick", of_encoder=True)


def _story(words: list[str]) -> None:
    cfg, found = encoders.supervised(words, kind="linear_probe", default="linear_probe_quick")
    if "auto_augment" in cfg.protocol:
        finetune.story(words, "linear_probe", "linear_probe_quick")
    else:
        encoders.require_labels(cfg, open_splits(cfg.data))
        evaluate.measure(cfg, found, [cfg.protocol], job="linear_probe")
