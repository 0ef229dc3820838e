"""Masked autoencoders and their relatives: pretrain image encoders without labels and learn what they are worth."""

import importlib
from typing import TYPE_CHECKING, Any

from mae.version import __version__

if TYPE_CHECKING:
    from mae import sklearn
    from mae.api import create, load

__all__ = ["__version__", "create", "load", "sklearn"]


def __getattr__(name: str) -> Any:
    if name in ("create", "load"):  # torch is imported when it is needed, so that `--help` answers at once
        from mae import api

        return getattr(api, name)
    if name == "sklearn":  # mae.sklearn.Encoder, by `import mae` alone
        return importlib.import_module("mae.sklearn")
    raise AttributeError(f"module 'mae' has no attribute {name!r}")
