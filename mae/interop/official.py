"""The layout of the MAE authors' checkpoints: timm's names for the encoder, `decoder_*` for the decoder, all under `model`.

Described in He et al., arXiv:2111.06377; written from the names alone.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.keys import Data
from mae.nets.positions import sincos_table

if TYPE_CHECKING:  # what is written is asked of the model; what is read is told before timm is imported
    from mae.methods.base import Autoencoder

# of a decoder: (their key, ours); encoder keys are the same but for the prefix
DECODER = (
    (r"^decoder_(embed|norm|pred)\.", r"decoder.\1."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^mask_token$", "decoder.mask_token"),
)
HEADS = ("head.",)  # of a fine-tuned model: the classifier is no part of an encoder


def is_full(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a decoder."""
    return any(key.startswith("decoder_") for key in state)


def is_one(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of a masked autoencoder: with a decoder, or with the fixed positions that a MAE is trained with."""
    positions = state.get("pos_embed")
    if is_full(state) or positions is None or positions.dim() != 3:
        return is_full(state)
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    fixed = side * side == positions.shape[1] - 1 and positions.shape[2] % 4 == 0
    return fixed and torch.allclose(positions.float(), sincos_table(positions.shape[2], (side, side), 1), atol=1e-4)


def to_ours(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Their names -> `encoder.*`, `decoder.*` and `decoder.positions`. A classifier is left out.

    Raises ConfigError where the decoder's class token has a position: ours has none, as the authors' is zero.
    """
    ours = {}
    for key, x in state.items():
        if key == "decoder_pos_embed":
            ours["decoder.positions"] = patch_positions(x, what)
        elif not key.startswith(HEADS):
            ours[next((re.sub(theirs, name, key) for theirs, name in DECODER if re.match(theirs, key)), f"encoder.{key}")] = x
    return ours


def from_ours(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`, for an encoder alone or a whole MAE."""
    theirs = {}
    for key, x in ours.items():
        part, _, name = key.partition(".")
        if part == "encoder":
            theirs[name] = x
        elif name == "positions":
            theirs["decoder_pos_embed"] = with_class_position(x)
        else:
            theirs[name if name == "mask_token" else f"decoder_{name}"] = x
    return theirs


def patch_positions(table: Tensor, what: str) -> Tensor:
    """A decoder's position table (1, 1 + N, D) without the class token's zeros."""
    if table.dim() != 3:
        raise ConfigError(f"{what} has decoder positions of shape {list(table.shape)}, not one row a patch: fetch it again")
    if table[:, :1].any():
        raise ConfigError(f"{what} has a decoder whose class token has a position other than zero, which this project's has not")
    return table[:, 1:]


def with_class_position(table: Tensor) -> Tensor:
    """(1, N, D) -> (1, 1 + N, D) with zeros for the class token."""
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def save(model: "Autoencoder", folder: Path, *, data: Data) -> list[Path]:
    """Writes `encoder.pth` and, for a MAE with its decoder, `full.pth`, as torch.load(..., weights_only=True) opens them; returns them.

    Beside `model` they hold `args`, a plain dict of what the weights do not tell: heads, sizes, normalisation, margin. Raises ConfigError
    for an encoder that is more than a plain ViT.
    """
    from mae.interop import assemble

    encoder = assemble.plain(model.encoder, "official")
    block: Any = encoder.blocks[0]  # timm's
    facts = {
        "num_heads": block.attn.num_heads,
        "image_size": list(encoder.patch_embed.img_size),
        "layer_norm_eps": encoder.norm.eps,
        "mean": list(data.mean),
        "std": list(data.std),
        "resize": data.resize,
    }
    ours = assemble.tensors_of(model)
    written = [folder / "encoder.pth"]
    torch.save({"model": from_ours(assemble.encoder_only(ours)), "args": facts}, written[0])
    if assemble.is_whole(model):
        decoding: Any = model.decoder.blocks[0]
        facts |= {
            "decoder_num_heads": decoding.attn.num_heads,
            "norm_pix_loss": model.norm_pix,
            "mask_ratio": model.mask_ratio,
        }
        written.append(folder / "full.pth")
        torch.save({"model": from_ours(ours), "args": facts}, written[1])
    return written
