"""From a configuration to a method: the class in the file that the method's name says, around the encoder."""

import dataclasses
import importlib

from mae.config import Config
from mae.methods.base import Autoencoder
from mae.nets import vit


def build(config: Config) -> Autoencoder:
    """The method with fresh weights (drawn from torch's global generator, which the caller seeds).

    Raises ConfigError where encoder, method and data do not fit each other.
    """
    overrides = {k: v for k, v in dataclasses.asdict(config.encoder).items() if k != "name" and v is not None}
    encoder = vit.create_encoder(config.encoder.name, image_size=config.image_size, channels=config.data.channels, overrides=overrides)
    arguments = {k: v for k, v in config.method.items() if k != "name"}
    return _class_of(config.method["name"])(encoder, **arguments)


def _class_of(name: str) -> type[Autoencoder]:
    module = importlib.import_module(f"mae.methods.{name}")
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Autoencoder) and c.__module__ == module.__name__]
    return found[-1]
