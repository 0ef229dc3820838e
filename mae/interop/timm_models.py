"""timm's own models: by name, with their pretrained weights, or out of a `local-dir:` folder as timm saves it."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.errors import ConfigError
from mae.interop import hub
from mae.interop.files import read_json
from mae.keys import Encoder
from mae.nets import names

WEIGHTS = "model.safetensors"
OVERRIDES = {f.name for f in fields(Encoder)} - {"name", "from_", "frozen"}


def by_name(name: str) -> VisionTransformer:
    """`vit_base_patch16_224.mae` and the like, pretrained, without a classifier; from the local cache or the network.

    Raises ConfigError for an unknown name, one without weights, one that is no ViT, and without a network.
    """
    try:
        facts = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise names.unknown(name, "timm:", timm.list_models("vit*", pretrained=True)) from error
    if facts is None or not (facts.hf_hub_id or facts.url or facts.file):
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ConfigError(f"timm:{name} has no pretrained weights{': choose ' + ' or '.join(tags[:4]) if tags else _near(name)}")
    with torch.device("meta"):  # looked at before its weights are fetched
        _vit(timm.create_model(name, num_classes=0), f"timm:{name}")
    overlay = None
    if facts.hf_hub_id:  # found in the cache without asking the network; the hub's files are in timm's own layout
        overlay = {"file": str(hub.fetch(facts.hf_hub_id, facts.hf_hub_filename or WEIGHTS)), "custom_load": False}
    try:
        encoder = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except OSError as error:
        raise ConfigError(f"the weights of timm:{name} could not be fetched: fetch them once where there is a network") from error
    return _vit(encoder, f"timm:{name}")


def folder(path: Path) -> VisionTransformer:
    """A folder with timm's config.json and model.safetensors. Raises ConfigError where one is missing or they do not fit each other."""
    config = read_json(path / "config.json")
    if not (path / WEIGHTS).is_file():
        raise ConfigError(f"{path} has a config.json but no {WEIGHTS}: save it with timm.models.save_for_hf(..., safe_serialization=True)")
    try:
        encoder = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0][:160]
        raise ConfigError(f"{path}: {WEIGHTS} is not the {config['architecture']} that its config.json tells of ({first})") from error
    return _vit(encoder, str(path))


def overrides(path: Path) -> dict[str, Any]:
    """What the folder's architecture differs in from its name, as keys of the `encoder` section."""
    arguments: Mapping[str, Any] = read_json(path / "config.json").get("model_args") or {}
    return {key: value for key, value in arguments.items() if key in OVERRIDES and value is not None}


def _vit(encoder: nn.Module, what: str) -> VisionTransformer:
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"{what} is a {type(encoder).__name__}, not a VisionTransformer: choose a vit_* model")
    return encoder.eval()


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models("vit*", pretrained=True), 1)
    return f": did you mean timm:{near[0]}?" if near else ": timm.list_models('vit*', pretrained=True) lists them"
