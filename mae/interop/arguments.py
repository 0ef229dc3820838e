"""What the arguments of a training, kept beside its weights, say that the weights do not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

LARGE = 1e9  # beyond any size, mean or deviation; nor is NaN below it


def said(facts: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of mae.interop.assemble: those of the MAE authors' code, and those that we write; nothing of another kind."""
    kinds: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "heads": ("num_heads", _count),
        "decoder_heads": ("decoder_num_heads", _count),
        "image_size": ("image_size", _size),
        "norm_pix": ("norm_pix_loss", lambda value: value if isinstance(value, bool) else None),
        "mask_ratio": ("mask_ratio", lambda value: value if _number(value) and 0 < value < 1 else None),
        "eps": ("layer_norm_eps", lambda value: value if _number(value) and value > 0 else None),
        "resize": ("resize", lambda value: value if _number(value) and value >= 1 else None),
        "mean": ("mean", _numbers),
        "std": ("std", lambda value: found if (found := _numbers(value)) and min(found) > 0 else None),
    }
    read = {ours: kind(facts.get(theirs)) for ours, (theirs, kind) in kinds.items()}
    return {name: value for name, value in read.items() if value is not None}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) in pixels, of a square by one number."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    return (sides[0], sides[1]) if len(sides) == 2 and all(map(_count, sides)) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGE < value < LARGE


def _numbers(value: Any) -> Sequence[float] | None:
    """One a channel; a number alone is for all of them."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values if values and all(map(_number, values)) else None
