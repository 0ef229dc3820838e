"""Weights in this project's naming -> a model: an encoder, or a whole masked autoencoder where there is a decoder too."""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.interop.architecture import Architecture
from mae.methods.base import Autoencoder
from mae.methods.mae import MAE
from mae.nets import vit
from mae.nets.decoder import Decoder

DECODER_HEAD_WIDTH = 32  # the paper's decoder: 512 wide, 16 heads


def autoencoder(
    state: Mapping[str, Tensor],
    found: Architecture,
    *,
    what: str,
    decoder_heads: int | None = None,
    mask_ratio: float = 0.75,
    norm_pix: bool | str = "auto",
    eps: float = 1e-6,
) -> Autoencoder:
    """The model of a state dict with keys `encoder.*` and, for a MAE, `decoder.*` and `decoder.positions`; in eval mode.

    `eps` is that of all layer norms. Raises ConfigError for a missing, unexpected or misshapen weight.
    """
    weights = dict(state)
    positions = weights.pop("decoder.positions", None)
    with torch.random.fork_rng(devices=[]):  # the first weights, overwritten below, are no draw of the caller's
        encoder = vit.create_encoder(found.name, image_size=found.image_size, channels=found.channels, overrides=found.overrides)
        if "encoder.fc_norm.weight" in weights and "encoder.norm.weight" not in weights:  # fine-tuned on the mean over patches
            encoder.fc_norm, encoder.norm = encoder.norm, nn.Identity()
        model = Autoencoder(encoder)
        if positions is not None:
            width, depth = _decoder_size(weights, what)
            heads = decoder_heads or max(width // DECODER_HEAD_WIDTH, 1)
            model = MAE(encoder, mask_ratio=mask_ratio, norm_pix=norm_pix, decoder_depth=depth, decoder_width=width, decoder_heads=heads)
            if positions.shape != model.decoder.positions.shape:
                raise ConfigError(f"{what} has decoder positions {tuple(positions.shape)}, not {tuple(model.decoder.positions.shape)}")
            model.decoder.positions.copy_(positions)
    load_strictly(model, weights, what)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model.eval()


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Loads weights of which none may be missing, left over or of another shape. Raises ConfigError that names them."""
    own = module.state_dict()
    wrong = {
        "lacks": [key for key in own if key not in weights],
        "has, and should not,": [key for key in weights if key not in own],
        "has in another shape": [key for key, x in weights.items() if key in own and x.shape != own[key].shape],
    }
    sentences = [
        f"{verb} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}" for verb, keys in wrong.items() if keys
    ]
    if sentences:
        raise ConfigError(f"{what} is not the model that it looks like: it {'; it '.join(sentences)}")
    module.load_state_dict(dict(weights), strict=True)


def is_whole(model: Autoencoder) -> TypeGuard[MAE]:
    """Whether the model is a MAE with the paper's decoder, for which the layouts have a place."""
    return isinstance(model, MAE) and isinstance(model.decoder, Decoder)


def tensors_of(model: Autoencoder) -> dict[str, Tensor]:
    """The inverse: `encoder.*` and, for a whole MAE, `decoder.*` with `decoder.positions`; contiguous, on the CPU."""
    tensors = {f"encoder.{key}": x for key, x in model.encoder.state_dict().items()}
    if is_whole(model):
        tensors |= {f"decoder.{key}": x for key, x in model.decoder.state_dict().items()}
        tensors["decoder.positions"] = model.decoder.positions
    return {key: x.detach().cpu().contiguous() for key, x in tensors.items()}


def encoder_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `encoder.*`."""
    return {key: x for key, x in tensors.items() if key.startswith("encoder.")}


def plain(encoder: nn.Module, layout: str) -> VisionTransformer:
    """The encoder where it is the plain ViT with a class token that a layout knows; else raises ConfigError that says what is too much."""
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"a {type(encoder).__name__} has no place in the {layout} layout: use --format timm, or train with a ViT")
    block: Any = encoder.blocks[0]  # timm's
    norms = [module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    odd = {
        "register tokens": encoder.reg_token is not None,
        "no class token": encoder.cls_token is None,
        "no positions for the class token": encoder.no_embed_class,
        "normalised queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "layer scale": not isinstance(block.ls1, nn.Identity),
        "a norm before its blocks": not isinstance(encoder.norm_pre, nn.Identity),
        "no final norm over its tokens": isinstance(encoder.norm, nn.Identity),
        "layer norms of more than one eps": len(set(norms)) > 1,
        "no bias in its attention": block.attn.qkv.bias is None,
    }
    if too_much := [name for name, is_so in odd.items() if is_so]:
        raise ConfigError(f"this encoder has {' and '.join(too_much)}, for which the {layout} layout has no place: use --format timm")
    return encoder


def _decoder_size(weights: Mapping[str, Tensor], what: str) -> tuple[int, int]:
    """(width, blocks)"""
    blocks = [int(number[1]) for key in weights if (number := re.match(r"decoder\.blocks\.(\d+)\.", key))]
    if "decoder.embed.weight" not in weights or not blocks:
        raise ConfigError(f"{what} holds only parts of a decoder: give the whole checkpoint, or the encoder alone")
    return len(weights["decoder.embed.weight"]), 1 + max(blocks)
