"""Pretraining as a job: a method learns from images alone, and is measured when it is done."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mae import api
from mae.commands import closing, job
from mae.config import Config
from mae.data.batch import normalise
from mae.data.sources import Splits
from mae.errors import ConfigError
from mae.evaluation.online import Online
from mae.interop.resize import resize
from mae.methods.base import Autoencoder
from mae.methods.build import build
from mae.methods.mae import MAE
from mae.training import lineage
from mae.training.run import RunFolder
from mae.training.schedule import Plan

log = logging.getLogger("mae")


def pretrain(config: Config, folder: RunFolder, splits: Splits, plan: Plan) -> None:
    """Trains the configuration's method in the folder, then exports, pictures and measures it. Raises as job.run."""
    online = Online(splits, config, images=_looked_at(folder))
    job.run(
        job.Job(
            kind="pretrain",
            name=folder.path.name,
            build=lambda: _method(config),
            loss=lambda module, images, keys: module.forward(images, keys=keys),
            forward=lambda module, batch: module(normalise(batch.images, config.data), keys=batch.keys),
            held_out=online.measure,
            reads=[lineage.encoder(config.encoder.from_, RunFolder(config.encoder.from_))] if config.encoder.from_ is not None else [],
            draw=lambda method, tracker, device, step: closing.draw(
                _own(method), splits, config, device, folder, tracker, step, training=True
            ),
            finish=lambda method, tracker, device, step: closing.close(config, folder, splits, _own(method), tracker, device, step),
        ),
        config,
        folder,
        splits,
        plan,
    )


def _own(module: nn.Module) -> Autoencoder:
    assert isinstance(module, Autoencoder)  # `_method` has built it
    return module


def _looked_at(folder: RunFolder) -> int | None:
    """How many images a resumed run was evaluated on: it goes on with as many."""
    counts = [row["held_out/images"] for row in folder.rows() if "held_out/images" in row]
    return counts[-1] if counts else None


def _method(config: Config) -> Autoencoder:
    """The method with fresh weights; those of its encoder from `encoder.from` where one is named, fitted to the images.

    A MAE goes on with the decoder too where the one that is named has it and the same is configured.
    """
    method = build(config)
    if config.encoder.from_ is not None:
        named = api.load(config.encoder.from_)
        given = named if isinstance(named, MAE) and isinstance(method, MAE) else Autoencoder(named.encoder)
        try:
            resize(given, image_size=config.image_size, channels=config.data.channels)
            method.encoder.load_state_dict(_fitted(given.encoder.state_dict(), method.encoder.state_dict(), config.encoder.from_))
        except RuntimeError as error:
            what = str(error).splitlines()[-1].strip()
            raise ConfigError(f"encoder.from={config.encoder.from_} does not fit the encoder that is configured: {what}") from error
        rest = "; the rest from fresh weights"
        if isinstance(given, MAE) and isinstance(method, MAE) and _alike(given) == _alike(method):
            method.decoder.load_state_dict(given.decoder.state_dict())
            rest = ", and its decoder"
        log.info("starting as %s: the encoder%s", config.encoder.from_, rest)
    return method


def _fitted(weights: dict[str, Tensor], own: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of an encoder that was fine-tuned on its mean, with the norm that it has after the mean where the method has its own."""
    moved = {key: key.replace("fc_norm.", "norm.", 1) for key in weights if key.startswith("fc_norm.") and key not in own}
    if not moved or not set(moved.values()) <= own.keys() - weights.keys():
        return weights
    log.info("%s was fine-tuned on the mean of its tokens: the norm after that mean becomes the norm of the tokens", name)
    return {moved.get(key, key): x for key, x in weights.items()}


def _alike(model: MAE) -> tuple[Any, ...]:
    """All that decides what its decoder makes of the encoder's tokens, but for the weights."""
    blocks: list[Any] = list(model.decoder.blocks)
    heads = [block.attn.num_heads if hasattr(block, "attn") else block.heads for block in blocks]
    return type(model.decoder), model.norm_pix, heads, [(name, x.shape) for name, x in model.decoder.state_dict().items()]
