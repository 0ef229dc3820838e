"""timm's VisionTransformer as the encoder: built by name, its state_dict left exactly timm's, run on any subset of patches."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.nets import names
from mae.nets.positions import sincos_table

if TYPE_CHECKING:
    from mae.nets.encoders import Encoder  # which is made of this


def create_encoder(
    name: str, *, image_size: tuple[int, int], channels: int = 3, overrides: Mapping[str, Any] | None = None
) -> VisionTransformer:
    """A timm VisionTransformer without a head, for images of (H, W) pixels, with fixed sine-cosine positions.

    `overrides` are VisionTransformer arguments (patch_size, embed_dim, depth, num_heads, reg_tokens, class_token ...).
    Weights start as in the MAE paper (Xavier-uniform linear layers, the patch embedding as the linear layer that it is).

    Raises ConfigError for an unknown name, a model that is no VisionTransformer, or sizes that do not fit each other.
    """
    overrides = dict(overrides or {})
    if overrides.get("class_token") is False and overrides.get("reg_tokens", 0) == 0:
        overrides.setdefault("no_embed_class", True)
    try:
        encoder = timm.create_model(
            name,
            img_size=image_size,
            in_chans=channels,
            num_classes=0,
            # the mean over patches, without swapping the encoder's norm for a fresh fc_norm: what mae reports is what timm then gives
            global_pool="avg",
            fc_norm=False,
            **overrides,
        )
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        raise names.unknown(name, "", timm.list_models("vit*")) from error
    except (AssertionError, TypeError) as error:
        raise ConfigError(f"timm cannot build encoder.name {name} with {overrides}: {error}") from error
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"encoder.name {name} is a {type(encoder).__name__}, not a VisionTransformer: choose a vit_* model")
    if encoder.pos_embed is None:
        raise ConfigError(f"encoder.name {name} has no position table: choose a model with absolute positions")
    initialise(encoder)
    set_sincos_positions(encoder)
    return encoder


def initialise(module: nn.Module) -> None:
    """The paper's initial weights: Xavier-uniform linear layers with zero bias, tokens from N(0, 0.02^2)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Conv2d):
            nn.init.xavier_uniform_(child.weight.flatten(1))
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for token in (getattr(module, "cls_token", None), getattr(module, "reg_token", None)):
        if token is not None:
            nn.init.normal_(token, std=0.02)


def set_sincos_positions(encoder: VisionTransformer) -> None:
    """Overwrites the position table by the fixed sine-cosine one; it stays a parameter (timm's state_dict), without gradient."""
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    table = sincos_table(encoder.embed_dim, encoder.patch_embed.grid_size, prefix)
    with torch.no_grad():
        positions(encoder).copy_(table)
    positions(encoder).requires_grad_(False)


def positions(encoder: VisionTransformer) -> nn.Parameter:
    """The position table (1, N or P + N, D) of an encoder that `create_encoder` has made: it refuses those without one."""
    assert encoder.pos_embed is not None
    return encoder.pos_embed


def choose_attention(module: nn.Module, device: torch.device, *, precision: str = "bf16") -> None:
    """Fused attention everywhere but on a CPU in half precision, where explicit products are faster at the lengths of a ViT.

    Measured on cores with AVX-512 and AMX (docs/speed.md): in bf16 the fused kernel took 3 to 6 times as long, in float32 up to 15% less
    on long sequences and about the same on short ones. Both compute the same.
    """
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = device.type != "cpu" or precision == "fp32"  # type: ignore[assignment]  # a Module's stubs know tensors and modules alone


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, p * q * C), patches row by row, the channel fastest within a patch."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch[0], q=patch[1])


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, N, p * q * C) -> (B, C, H, W)."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch[0], q=patch[1])


def patch_values(encoder: "Encoder") -> int:
    """How many numbers a patch of the encoder's images is: p * q * C."""
    height, width = encoder.patch_embed.patch_size
    return height * width * encoder.patch_embed.proj.in_channels


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens of those ids: (B or 1, N, D), (B, K) -> (B, K, D). Rows are copied whole, which gather along the tokens does not do."""
    if len(tokens) == 1:
        return F.embedding(ids, tokens[0])
    starts = torch.arange(0, tokens.shape[0] * tokens.shape[1], tokens.shape[1], device=ids.device)
    return F.embedding(ids + starts[:, None], tokens.flatten(0, 1))


def encode_patches(encoder: VisionTransformer, patches: Tensor, ids: Tensor) -> Tensor:
    """Runs the encoder on some patches only: patches (B, N, p * q * C), ids (B, V) -> (B, P + V, D) after the final norm.

    Only those pixels are embedded, as one matrix product; P prefix tokens (CLS, registers) come first. With all ids this equals
    timm's `forward_features` of the image.
    """
    x = _embed(encoder, take(patches, ids))
    table: Tensor = positions(encoder)
    prefix: list[Tensor] = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    prefix_tokens = torch.cat(prefix, dim=1) if prefix else x.new_zeros(1, 0, x.shape[2])
    if not encoder.no_embed_class:
        prefix_tokens = prefix_tokens + table[:, : encoder.num_prefix_tokens]
        table = table[:, encoder.num_prefix_tokens :]
    x = x + take(table, ids)
    x = torch.cat([prefix_tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
    x = encoder.norm_pre(encoder.pos_drop(x))
    return encoder.norm(encoder.blocks(x))


def _embed(encoder: VisionTransformer, patches: Tensor) -> Tensor:
    projection = encoder.patch_embed.proj
    weight = rearrange(projection.weight, "d c p q -> d (p q c)")
    return encoder.patch_embed.norm(F.linear(patches, weight, projection.bias))


def pool(encoder: "Encoder", tokens: Tensor, how: str) -> Tensor:
    """(B, P + N, D) -> (B, D): 'cls' takes the class token, 'mean' averages the patch tokens.

    An encoder that was fine-tuned on the mean may have its last norm after it (timm's fc_norm).
    """
    after = getattr(encoder, "fc_norm", nn.Identity())
    if how == "cls":
        if encoder.cls_token is None:
            raise ConfigError("this encoder has no class token: use pool=mean")
        return after(tokens[:, 0])
    return after(tokens[:, encoder.num_prefix_tokens :].mean(1))


def feature_maps(encoder: "Encoder", images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
    """Patch features of chosen blocks (default: the last one), normalised, as maps: a list of (B, D, h, w) for dense tasks.

    Layers count from 0; negative ones from the end. Only a timm VisionTransformer has others than the last one.
    """
    if layers is None:
        tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
        return [rearrange(tokens, "b (h w) d -> b d h w", h=images.shape[2] // encoder.patch_embed.patch_size[0])]
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"a {type(encoder).__name__} has feature maps of its last block alone: leave layers out, or choose a ViT")
    indices = [layer % len(encoder.blocks) for layer in layers]
    return cast(list[Tensor], encoder.forward_intermediates(images, indices=indices, norm=True, intermediates_only=True))


def block_tokens(encoder: VisionTransformer, images: Tensor, which: Sequence[int]) -> list[Tensor]:
    """The tokens after some blocks, in rising order and counted from 1, normalised as the last ones: a list of (B, P + N, D), prefix
    tokens first.
    """
    found = encoder.forward_intermediates(
        images,
        indices=[layer - 1 for layer in which],
        norm=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
        return_prefix_tokens=True,
    )
    pairs = cast(list[Tensor | tuple[Tensor, Tensor]], found)  # (patches, prefix) where there are prefix tokens
    return [torch.cat(pair[::-1], dim=1) if isinstance(pair, tuple) else pair for pair in pairs]
