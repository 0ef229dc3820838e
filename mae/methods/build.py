"""From a configuration to a method: what the file of the method's name makes around the encoder."""

import importlib
from types import ModuleType

from mae.config import Config
from mae.methods.base import Autoencoder
from mae.nets import encoders


def build(config: Config) -> Autoencoder:
    """The method with fresh weights (drawn from torch's global generator, which the caller seeds).

    A method's file holds one Autoencoder, or a function `create(encoder, **arguments)` where it sets up another file's idea.
    Raises ConfigError where encoder, method and data do not fit each other.
    """
    arguments = {k: v for k, v in config.method.items() if k != "name"}
    name, overrides = config.encoder.name, config.encoder.overrides
    encoder = encoders.create(name, image_size=config.image_size, channels=config.data.channels, overrides=overrides)
    if config.encoder.frozen:
        encoder.requires_grad_(False)
    module = importlib.import_module(f"mae.methods.{config.method['name']}")
    return (getattr(module, "create", None) or class_in(module))(encoder, **arguments)


def class_in(module: ModuleType) -> type[Autoencoder]:
    """The Autoencoder that a method's module defines."""
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Autoencoder) and c.__module__ == module.__name__]
    return found[-1]
