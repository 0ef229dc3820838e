"""Pretraining as a job: a method learns from images alone, and is measured when it is done."""

from torch import nn

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
from mae.training import lineage
from mae.training.run import RunFolder
from mae.training.schedule import Plan


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
            reads=[_start(config.encoder.from_)] if config.encoder.from_ is not None else [],
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


def _start(word: str) -> lineage.Artifact:
    """The encoder that training starts from."""
    return lineage.encoder(word, RunFolder(word))


def _own(module: nn.Module) -> Autoencoder:
    assert isinstance(module, Autoencoder)  # `_method` has built it
    return module


def _looked_at(folder: RunFolder) -> int | None:
    """How many images a resumed run was evaluated on: it goes on with as many."""
    counts = [row["held_out/images"] for row in folder.rows() if "held_out/images" in row]
    return counts[-1] if counts else None


def _method(config: Config) -> Autoencoder:
    """The method with fresh weights; those of its encoder from `encoder.from` where one is named, fitted to the images."""
    method = build(config)
    if config.encoder.from_ is not None:
        given = Autoencoder(api.load(config.encoder.from_).encoder)
        try:
            resize(given, image_size=config.image_size, channels=config.data.channels)
            method.encoder.load_state_dict(given.encoder.state_dict())
        except RuntimeError as error:
            what = str(error).splitlines()[-1].strip()
            raise ConfigError(f"encoder.from={config.encoder.from_} does not fit the encoder that is configured: {what}") from error
    return method
