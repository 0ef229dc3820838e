"""Masked autoencoders and their relatives: pretrain image encoders without labels and learn what they are worth."""

from typing import TYPE_CHECKING, Any

from mae.version import __version__

if TYPE_CHECKING:
    from mae.api import create, load

__all__ = ["__version__", "create", "load"]


def __getattr__(name: str) -> Any:
    if name in ("create", "load"):  # torch is imported when it is needed, so that `--help` answers at once
        from mae import api

        return getattr(api, name)
    raise AttributeError(f"module 'mae' has no attribute {name!r}")
