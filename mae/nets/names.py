"""The names of encoders, timm's read out of its files: to import timm takes seconds, for which a misspelt word should not wait."""

import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mae.errors import ConfigError

OWN = ("conv", "dense", "linear")  # encoders without attention, made here


def check(name: str, before: str = "") -> None:
    """Raises ConfigError for a name that stands nowhere in timm's files; `before` it stands "timm:", or nothing in `encoder.name`.

    Whatever timm may know is left to timm, and all is where it is imported already: users may have registered models of their own.
    """
    word = name.partition(".")[0]  # what follows is the tag of some weights
    if "timm" in sys.modules or not word or ":" in word or not _text("vision_transformer.py"):
        return
    if f"def {word}(" not in _text("vision_transformer.py") and not re.search(rf"\b{re.escape(word)}\b", _text("*.py")):
        raise unknown(name, before, re.findall(r"^def (vit_\w+)", _text("*.py"), re.MULTILINE))


def is_vit(name: str) -> bool:
    """Whether timm defines a model of that name as a plain Vision Transformer."""
    return f"def {name}(" in _text("vision_transformer.py")


def unknown(name: str, before: str, known: Sequence[str]) -> ConfigError:
    """The sentence that refuses a name, with the nearest of those that are known."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {before}{near[0]}?" if near else "timm.list_models('vit*') lists them"
    return ConfigError(f"{before or 'encoder.name '}{name} is no timm model: {hint}")


@functools.cache
def _text(files: str) -> str:
    """Of timm's files of models, some; nothing where timm is not installed, which who imports it will tell."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        return ""
    return "\n".join(file.read_text() for file in sorted((Path(found.origin).parent / "models").glob(files)))
