"""The architecture of a Vision Transformer, told from the shapes of its weights in timm's naming."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mae.errors import ConfigError
from mae.interop.files import looks_like
from mae.nets import names
from mae.nets.sizes import patch_size

log = logging.getLogger("mae")

# (width, blocks) -> family, heads, MLP ratio: Dosovitskiy et al., arXiv:2010.11929; Zhai et al., arXiv:2106.04560
FAMILIES = {
    (192, 12): ("vit_tiny", 3, 4.0),
    (384, 12): ("vit_small", 6, 4.0),
    (768, 12): ("vit_base", 12, 4.0),
    (1024, 24): ("vit_large", 16, 4.0),
    (1280, 32): ("vit_huge", 16, 4.0),
    (1408, 40): ("vit_giant", 16, 48 / 11),
    (1664, 48): ("vit_gigantic", 16, 64 / 13),
}
HEAD_WIDTH = 64  # of every ViT that is not said to be otherwise


class Architecture(NamedTuple):
    """What mae.nets.vit.create_encoder builds the encoder from."""

    name: str  # timm's
    overrides: dict[str, Any]  # what differs from it, as keys of the `encoder` section
    image_size: tuple[int, int]
    channels: int


def infer(state: Mapping[str, Tensor], *, what: str, heads: int | None = None, image_size: tuple[int, int] | None = None) -> Architecture:
    """From the encoder's state dict in timm's naming; `what` names its origin in errors.

    The weights tell neither how many `heads` attention has (then those of the known sizes, or heads of 64) nor the shape of a grid that is
    no square (`image_size`). Raises ConfigError for weights of anything but a ViT with a position table.
    """
    if any(key not in state for key in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "pos_embed")):
        raise ConfigError(f"{what} holds no Vision Transformer with a position table: {looks_like(state)}")
    if state["pos_embed"].dim() != 3 or state["patch_embed.proj.weight"].dim() != 4:
        raise ConfigError(f"{what} has patches or positions in another shape than a Vision Transformer of timm: {looks_like(state)}")
    if len(set(state["patch_embed.proj.weight"].shape[2:])) > 1:
        raise ConfigError(f"{what} has patches of shape {list(state['patch_embed.proj.weight'].shape[2:])}: only square ones are read")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(number[1]) for key in state if (number := re.match(r"blocks\.(\d+)\.", key)))
    hidden = len(state["blocks.0.mlp.fc1.weight"])

    known = FAMILIES.get((width, depth))
    family, usual_heads, ratio = known or ("vit_base", 12, 4.0)
    usual_width, usual_depth = (width, depth) if known else (768, 12)
    name = next(n for p in (patch, 16, 14) if names.is_vit(n := f"{family}_patch{p}_224"))
    heads = heads or (usual_heads if known else _guessed_heads(width, what))
    own = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    usual = {"patch_size": patch_size(name, None), "embed_dim": usual_width, "depth": usual_depth, "num_heads": usual_heads}
    overrides = {key: value for key, value in own.items() if value != usual[key]} | _extras(state)
    if hidden != int(width * ratio):
        overrides["mlp_ratio"] = mlp_ratio(hidden, width)
    prefix = int("cls_token" in state) + overrides.get("reg_tokens", 0)
    size, no_embed_class = _images(state["pos_embed"].shape[1], prefix, patch, image_size, what)
    return Architecture(name, overrides | ({"no_embed_class": True} if no_embed_class else {}), size, channels)


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which int(width * ratio) is the hidden width: floating point may fall short of the quotient."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _guessed_heads(width: int, what: str) -> int:
    if width % HEAD_WIDTH:
        raise ConfigError(
            f"{what} does not tell how many attention heads its blocks of {width} have: give a folder with its config.json, as timm and "
            "Hugging Face save it"
        )
    heads = width // HEAD_WIDTH
    log.warning("%s does not tell how many attention heads its blocks of %d have: %d assumed, of %d each", what, width, heads, HEAD_WIDTH)
    return heads


def _extras(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments that show in the keys: what a plain ViT has not, or lacks."""
    block = "blocks.0."
    found: dict[str, Any] = {}
    if f"{block}attn.qkv.bias" not in state:
        found["qkv_bias"] = False
    if f"{block}attn.q_norm.weight" in state:
        found["qk_norm"] = True
    if f"{block}ls1.gamma" in state:
        found["init_values"] = 1e-5  # only a start, which the weights overwrite
    if "cls_token" not in state:
        found["class_token"] = False
    if "reg_token" in state:
        found["reg_tokens"] = state["reg_token"].shape[1]
    return found


def _images(positions: int, prefix: int, patch: int, image_size: tuple[int, int] | None, what: str) -> tuple[tuple[int, int], bool]:
    """((height, width) of the images in pixels, whether the prefix tokens have no positions)."""
    # registers seldom have positions, a class token nearly always
    for no_embed_class in (True, False) if prefix > 1 else (False, True):
        count = positions - (0 if no_embed_class else prefix)
        if image_size is not None and count == (image_size[0] // patch) * (image_size[1] // patch):
            return image_size, no_embed_class and prefix > 0
        side = math.isqrt(max(count, 0))
        if image_size is None and side * side == count and side:
            return (side * patch, side * patch), no_embed_class and prefix > 0
    shape = f"images of {image_size[0]} x {image_size[1]} pixels" if image_size else "a square image"
    raise ConfigError(
        f"{what} has {positions} positions, which is no grid of patches of {patch} on {shape}: give a folder with its config.json"
    )
