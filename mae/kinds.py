"""What kind of value a key takes, in the words of help and of refusals."""

from types import NoneType
from typing import Any, get_args, get_origin

SAID = {"integer": int, "number": float, "text": str}  # how a key's line of help begins whose default is null, of which no type shows
KINDS = {int: "whole number", float: "number", str: "text", list: "list"}


def said(doc: str) -> tuple[type | None, str]:
    """What a line of help says of the type, "integer: only the first so many", and the rest of it."""
    head, _, rest = doc.partition(": ")
    return (SAID[head], rest) if head in SAID else (None, doc)


def shown(value: object) -> str:
    """A value as it is written on the command line: null, true, [0.9,0.95]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list) else str(value)


def refusal(name: str, value: object, declared: Any, default: object) -> str:
    """'train.batch_size=abc is no whole number: the default is 256'; `declared` is a key's type, or "auto" for that or a number."""
    return f"{name}={shown(value)} is {_not(declared)}: the default is {shown(default)}"


def _not(declared: Any) -> str:
    if declared == "auto":
        return "neither auto nor a number"
    inner = [t for t in get_args(declared) if t is not NoneType]
    if get_origin(declared) is list:
        return f"no list of {KINDS[inner[0]]}s"
    kind = inner[0] if inner else declared
    return "neither true nor false" if kind is bool else f"no {KINDS[kind]}"
