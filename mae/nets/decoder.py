"""The light decoder that turns an encoder's tokens into patches: He et al., arXiv:2111.06377, section 3."""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.nets import vit
from mae.nets.positions import sincos_table

_norm = partial(nn.LayerNorm, eps=1e-6)


def sizes(encoder: nn.Module, depth: int | str, width: int | str, heads: int | str) -> tuple[int, int, int]:
    """(depth, width, heads) of the decoder of an encoder, each as given or 'auto'.

    `auto` is the paper's 8 blocks of 512 for encoders at least 768 wide; smaller ones get a quarter of their blocks at half their
    width; heads are 32 wide. Raises ConfigError where the heads do not divide the width.
    """
    large = encoder.embed_dim >= 768
    depth = (8 if large else max(1, len(encoder.blocks) // 4)) if depth == "auto" else int(depth)
    width = (512 if large else encoder.embed_dim // 2) if width == "auto" else int(width)
    heads = max(1, width // 32) if heads == "auto" else int(heads)
    if width % heads:
        nearest = max(width // heads, 1) * heads
        raise ConfigError(f"method.decoder_width {width} is not a multiple of method.decoder_heads {heads}: try {nearest}")
    return depth, width, heads


class Decoder(nn.Module):
    """Self-attention over the tokens of known and of unknown patches, then one linear layer to a patch's values.

    `inputs` is the width of the tokens that it is given (default: the encoder's), `outputs` the number of values of a patch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        depth: int | str,
        width: int | str,
        heads: int | str,
        inputs: int | None = None,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        depth, width, heads = sizes(encoder, depth, width, heads)
        self.embed = nn.Linear(inputs or encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_table(width, encoder.patch_embed.grid_size), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=_norm) for _ in range(depth)))
        self.norm = _norm(width)
        self.pred = nn.Linear(width, outputs or vit.patch_values(encoder))
        vit.initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, known: Tensor, unknown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decoded tokens of the known (B, V, width) and of the unknown patches (B, H, width), normalised: `pred` makes values of them.

        tokens (B, P + V, inputs): P prefix tokens, then those of the patches known (B or 1, V). Attention does not see the order of its
        tokens, so they stay sorted by what is known: nothing is put back in place.
        """
        count = known.shape[1]
        x = self.embed(tokens)
        prefix = x.shape[1] - count
        parts = [x[:, :prefix], x[:, prefix:] + vit.take(self.positions, known)]
        if unknown is not None:
            parts.append(self.mask_token + vit.take(self.positions, unknown))
        x = self.norm(self.blocks(torch.cat(parts, dim=1)))
        return x[:, prefix : prefix + count], x[:, prefix + count :]
