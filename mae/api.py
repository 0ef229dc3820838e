"""The Python API: a method from configuration words, an encoder from wherever it lies."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mae import config
from mae.errors import ConfigError
from mae.interop.load import open_encoder
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


def load(encoder: str | Path) -> Autoencoder:
    """The method of a run folder with the weights of its newest good checkpoint, or the model of any other encoder; in eval mode.

    A fine-tuned run gives the encoder of its classifier/. Others are `timm:NAME`, `hf:NAME`, a folder as timm or Hugging Face saves it, a
    checkpoint file (mae.interop.load). Raises ConfigError where there is none, or no checkpoint yet.
    """
    folder = RunFolder(encoder)
    settings = folder.config()
    if settings is None:
        return open_encoder(str(encoder)).model
    if (classifier := folder.classifier()) is not None:
        return open_encoder(str(classifier)).model
    newest = checkpoint.newest(folder.checkpoints)
    if newest is None:
        raise ConfigError(f"{encoder} has no checkpoint yet: train it first")
    method = build(config.load([], base=settings))
    try:
        method.load_state_dict(checkpoint.weights_of(newest), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{encoder} is of another version and does not fit: open its folder encoder/, or train it again") from error
    return method.eval()
