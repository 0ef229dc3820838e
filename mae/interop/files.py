"""Tensors out of a checkpoint file that may come from anywhere: nothing in it is executed, and what it is not is said in a sentence."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae.errors import ConfigError

NESTED = ("model", "state_dict", "model_state_dict")  # where trainers keep the weights beside the optimizer
WRAPPED = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every key
# (pattern of a key, what a file with such keys looks like); the first that fits is named
LOOKS = (
    (r"layer\d\.\d+\.conv\d\.weight", "a ResNet state dict"),
    (r"^blocks\.\d+\.attn\.relative_position_bias_table", "a BEiT state dict"),
    (r"relative_position_bias_table", "a Swin Transformer state dict"),
    (r"stages\.\d+\.(blocks|layers)\.", "a ConvNeXt state dict"),
    (r"(^|\.)visual\.", "a CLIP state dict"),
    (r"attention\.self\.query", "a BERT state dict"),
    (r"down_blocks\.|input_blocks\.", "a diffusion U-Net"),
    (r"^(student|teacher)\.", "a DINO training checkpoint, with a student and a teacher"),
    (r"attn\.rel_pos|rope", "a Vision Transformer with relative or rotary positions"),
    (r"mlp\.w12\.", "a Vision Transformer with gated MLPs"),
    (r"features\.\d+\.", "a torchvision convolutional network"),
)


class Content(NamedTuple):
    """What a checkpoint file holds."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # what it says of its training besides (`args`), by name


def read(file: Path) -> Content:
    """The weights in a .safetensors, .pth, .pt or .bin file, out of `model` or `state_dict` where they are nested there.

    Pickles are read with weights_only=True, plus argparse.Namespace, in which training scripts keep their arguments. Raises ConfigError
    for a file that needs more than that, that is damaged, or that holds something else than the weights of a model.
    """
    content, facts = _safetensors(file) if file.suffix == ".safetensors" else _pickle(file)
    if isinstance(content, Mapping):
        arguments = content.get("args")
        arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
        facts |= arguments if isinstance(arguments, Mapping) else {}
    weights = content
    while isinstance(weights, Mapping) and (inner := next((n for n in NESTED if isinstance(weights.get(n), Mapping)), None)):
        weights = weights[inner]
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(k, str) and isinstance(x, Tensor) for k, x in weights.items()):
        raise ConfigError(f"{file} holds no encoder: {_no_weights(weights)}")
    return Content(unwrapped(dict(weights)), facts)


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without a prefix that wrappers of the model have put before all keys."""
    for prefix in WRAPPED:
        if all(key.startswith(prefix) for key in tensors):
            return unwrapped({key.removeprefix(prefix): x for key, x in tensors.items()})
    return tensors


def looks_like(tensors: Mapping[str, Any]) -> str:
    """What a state dict seems to be of, with one of its keys: for the sentence that refuses it."""
    for pattern, name in LOOKS:
        for key in tensors:
            if re.search(pattern, key):
                return f"it looks like {name}: it has {key}"
    return f"its {len(tensors)} tensors are {', '.join(list(tensors)[:3])}{' ...' if len(tensors) > 3 else ''}"


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, "pt") as opened:
            facts = {name: _from_text(text) for name, text in (opened.metadata() or {}).items()}
            return {name: opened.get_tensor(name) for name in opened.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is no safetensors file, or a damaged one ({_short(error)}): fetch it again") from error


def _from_text(text: str) -> Any:
    """A value of safetensors' metadata, which are all texts: "12", "[0.5, 0.5]"."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _pickle(file: Path) -> tuple[Any, dict[str, Any]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol, which are refused below
            return torch.load(file, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error))
        with file.open("rb") as opened:
            bare = opened.read(1) == b"\x80"  # a pickle of anything, not torch's archive
        if named is None and not bare:
            raise ConfigError(f"{file} is no checkpoint, or a damaged one: fetch it again") from error
        raise ConfigError(
            f"{file} is refused: to open it is to run code of its own ({named[1] if named else 'a pickle'}); where it was made, "
            "save the weights alone with torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} is no checkpoint, or a damaged one ({_short(error)}): fetch it again") from error


def _no_weights(content: Any) -> str:
    if isinstance(content, Mapping):
        if {"state", "param_groups"} <= set(content):
            return "it looks like an optimizer's state"
        others = [str(k) for k, x in content.items() if not isinstance(x, Tensor)]
        if not content or len(others) == len(content):
            return f"there are no tensors in it{', only ' + ', '.join(others[:3]) if others else ''}"
        return f"beside tensors it has {', '.join(others[:3])}" if others else "its tensors have no names"
    return f"it holds a {type(content).__name__} and no state dict"


def _short(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:120]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError where the file holds none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({_short(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__} where a configuration was expected: fetch it again")
    return content
