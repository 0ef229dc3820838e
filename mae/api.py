"""The Python API: a method from configuration words, an encoder from a run folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mae import config
from mae.errors import ConfigError
from mae.methods.base import Autoencoder
from mae.methods.build import build
from mae.training import checkpoint
from mae.training.run import RunFolder


def create(words: Sequence[str] = ()) -> Autoencoder:
    """A method with fresh weights: `create(["configs/methods/mae.yaml", "encoder.depth=4"])`. Raises ConfigError."""
    cfg = config.load(words)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.train.seed)
        return build(cfg)


def load(run: str | Path) -> Autoencoder:
    """The method of a run folder with the weights of its newest good checkpoint, in eval mode.

    Raises ConfigError where the folder holds no run or no checkpoint.
    """
    folder = RunFolder(run)
    settings = folder.config()
    if settings is None:
        raise ConfigError(f"{run} is no run folder: it has no config.yaml")
    newest = checkpoint.newest(folder.checkpoints)
    if newest is None:
        raise ConfigError(f"{run} has no checkpoint yet: train it first")
    method = build(config.load([], base=settings))
    method.load_state_dict(checkpoint.weights_of(newest), strict=True)
    return method.eval()
