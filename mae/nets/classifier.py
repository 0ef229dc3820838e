"""An encoder with a classification head: linear probe (frozen), fine-tuning (all weights), partial fine-tuning (the last blocks), as in the
MAE paper, section 4.3 and appendix A.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import timm
import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import ConfigError


class Encodes(Protocol):
    """A module that makes features (B, D) of normalised images (B, C, H, W)."""

    def encode(self, images: Tensor, pool: str, /) -> Tensor: ...

    def requires_grad_(self, requires_grad: bool) -> Self: ...

    def eval(self) -> Self: ...


class LinearProbe(nn.Module):
    """Frozen encoder -> BatchNorm1d(affine=False) -> Linear. The encoder stays in eval mode whatever the module is in.

    The normalisation replaces a hand-tuned feature scale and is folded into the linear map at test time (paper, A.1).
    """

    encoder: Encodes

    def __init__(self, encoder: Encodes, *, width: int, classes: int, pool: str) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.pool = pool
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "LinearProbe":
        """Switches the head's mode; the encoder is never trained."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W)."""
        with torch.no_grad():
            features = self.encoder.encode(images, self.pool)
        return self.head(self.norm(features.float()))


def finetuned(
    name: str,
    encoder: VisionTransformer,
    *,
    image_size: tuple[int, int],
    classes: int,
    drop_path: float,
    overrides: Mapping[str, Any],
) -> VisionTransformer:
    """A timm classifier that starts from a pretrained encoder: mean pooling, a NEW fc_norm, a head near zero, trainable positions.

    The pretrained final norm is discarded, as in the paper; positions are resampled where the image size differs.
    """
    model = timm.create_model(
        name,
        img_size=image_size,
        in_chans=encoder.patch_embed.proj.in_channels,
        num_classes=classes,
        global_pool="avg",
        drop_path_rate=drop_path,
        **overrides,
    )
    assert isinstance(model, VisionTransformer)  # the name of one makes one
    assert isinstance(model.head, nn.Linear)
    weights = {k: v for k, v in encoder.state_dict().items() if not k.startswith("norm.")}
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    weights["pos_embed"] = resample_abs_pos_embed(
        weights["pos_embed"], new_size=model.patch_embed.grid_size, old_size=encoder.patch_embed.grid_size, num_prefix_tokens=prefix
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    unknown = [*unexpected, *(k for k in missing if not k.startswith(("fc_norm.", "head.")))]
    if unknown:
        raise ValueError(f"the encoder's weights do not fit the classifier: {unknown}")
    trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    return model


def check_blocks(blocks: float, depth: int) -> None:
    """Raises ConfigError where `blocks` is no number of last blocks that an encoder of that depth has: 0, 0.5, 1 ... depth."""
    if blocks != 0.5 and (blocks != int(blocks) or not 0 <= blocks <= depth):
        raise ConfigError(f"protocol.blocks {blocks:g} must be 0 (the head), 0.5 (the last block's MLP) or a whole number up to {depth}")


def freeze_below(model: VisionTransformer, blocks: float) -> None:
    """Leaves only the last `blocks` blocks of a classifier to train, with what stands behind them: the norm and the head.

    0.5 = the MLP of the last block with its norm; 0 = the head alone. What is frozen (the patch embedding, positions and tokens too) is
    never dropped either: drop path is for what learns. Raises ConfigError as check_blocks.
    """
    check_blocks(blocks, len(model.blocks))
    whole = len(model.blocks) - int(blocks)
    trained = [model.head, *model.blocks[whole:]] + ([model.fc_norm] if blocks else [])
    model.requires_grad_(False)
    for block in model.blocks[:whole]:
        block.drop_path1 = nn.Identity()
        if blocks == 0.5 and block is model.blocks[-1]:
            trained += [block.norm2, block.mlp, block.ls2]
        else:
            block.drop_path2 = nn.Identity()
    for module in trained:
        module.requires_grad_(True)
