"""Encoders by name: any timm VisionTransformer, or one of our own without attention (conv, dense, linear)."""

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from mae.nets import sizes, vit
from mae.nets.conv import ConvEncoder, DenseEncoder

Encoder = VisionTransformer | ConvEncoder | DenseEncoder


def create(name: str, *, image_size: tuple[int, int], channels: int, overrides: Mapping[str, Any]) -> Encoder:
    """An encoder for images of (H, W) pixels; of `overrides` our own take patch_size, embed_dim (64) and depth (1) alone.

    Raises ConfigError for a name that neither timm nor we know and for sizes that do not fit each other.
    """
    width, depth = overrides.get("embed_dim", 64), overrides.get("depth", 1)
    if name == "conv":
        patch = sizes.patch_size(name, overrides.get("patch_size"))
        return ConvEncoder(image_size, channels, patch_size=patch, embed_dim=width, depth=depth)
    if name in ("dense", "linear"):
        return DenseEncoder(image_size, channels, embed_dim=width, sigmoid=name == "dense")
    return vit.create_encoder(name, image_size=image_size, channels=channels, overrides=overrides)
