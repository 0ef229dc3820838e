"""Light decoders that turn tokens into pixels; for a ViT the one of He et al., arXiv:2111.06377, section 3."""

from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.nets import vit
from mae.nets.conv import ConvDecoder, ConvEncoder, DenseEncoder
from mae.nets.encoders import Encoder
from mae.nets.positions import sincos_table

_norm = partial(nn.LayerNorm, eps=1e-6)


def sizes(encoder: Encoder, depth: int | str, width: int | str, heads: int | str) -> tuple[int, int, int]:
    """(depth, width, heads) of the decoder of an encoder, each as given or 'auto'.

    `auto` is the paper's 8 blocks of 512 for encoders at least 768 wide; smaller ones get a quarter of their blocks at half their
    width, at least 64 unless they are narrower themselves; heads are 32 wide. Raises ConfigError where the heads do not divide the width.
    """
    large = encoder.embed_dim >= 768
    depth = (8 if large else max(1, len(encoder.blocks) // 4)) if depth == "auto" else int(depth)
    width = (512 if large else min(encoder.embed_dim, max(64, encoder.embed_dim // 2))) if width == "auto" else int(width)
    heads = max(1, width // 32) if heads == "auto" else int(heads)
    if depth < 0 or width < 1 or heads < 1:
        given = f"method.decoder_depth {depth}, decoder_width {width} and decoder_heads {heads}"
        raise ConfigError(f"{given} must not be below 0, 1 and 1: leave them at auto")
    if width % heads:
        nearest = max(width // heads, 1) * heads
        raise ConfigError(f"method.decoder_width {width} is not a multiple of method.decoder_heads {heads}: try {nearest}")
    return depth, width, heads


def mlp_ratio(encoder: Encoder) -> float:
    """The hidden width of a block's MLP over the block's width: the decoder's blocks have their encoder's proportions."""
    mlp = getattr(encoder.blocks[0], "mlp", None) if len(encoder.blocks) else None
    return mlp.fc2.in_features / encoder.embed_dim if mlp is not None else 4.0


class Decoder(nn.Module):
    """Self-attention over the tokens of known and of unknown patches, then one linear layer to a patch's values.

    `inputs` is the width of the tokens that it is given (default: the encoder's). A decoder that `hides` has a mask token.
    """

    positions: Tensor  # (1, N, width)

    def __init__(
        self,
        encoder: Encoder,
        *,
        depth: int | str,
        width: int | str,
        heads: int | str,
        inputs: int | None = None,
        hides: bool = True,
    ) -> None:
        super().__init__()
        depth, width, heads = sizes(encoder, depth, width, heads)
        self.embed = nn.Linear(inputs or encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if hides else None
        self.register_buffer("positions", sincos_table(width, encoder.patch_embed.grid_size), persistent=False)
        ratio = mlp_ratio(encoder)
        # timm says type[Module] and calls it with a width
        block = partial(PartialBlock, width, heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=_norm)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm = _norm(width)
        self.pred = nn.Linear(width, vit.patch_values(encoder))
        vit.initialise(self)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, known: Tensor, unknown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The decoded tokens of the known (B, V, width) and of the unknown patches (B, H, width), normalised: `pred` makes values of them.

        tokens (B, P + V, inputs): P prefix tokens, then those of the patches known (B or 1, V). Attention does not see the order of its
        tokens, so they stay sorted by what is known: nothing is put back in place.
        """
        parts = self._parts(tokens, known)
        if unknown is not None:
            parts.append(self._masks(unknown))
        x = torch.cat(parts, dim=1)
        for block in self.blocks:
            x = block(x)
        prefix, end = parts[0].shape[1], parts[0].shape[1] + parts[1].shape[1]
        x = self.norm(x)
        return x[:, prefix:end], x[:, end:]

    def unknown(self, tokens: Tensor, known: Tensor, unknown: Tensor) -> Tensor:
        """Of the same the second part alone, (B, H, width): the last block does for the other tokens no more than being asked takes."""
        x = torch.cat([*self._parts(tokens, known), self._masks(unknown)], dim=1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, unknown.shape[1] if i == last else None)
        return self.norm(x[:, -unknown.shape[1] :])  # all there is, but for a decoder without blocks

    def _parts(self, tokens: Tensor, known: Tensor) -> list[Tensor]:
        """The prefix and the known tokens, as the blocks take them."""
        x = self.embed(tokens)
        prefix = x.shape[1] - known.shape[1]
        return [x[:, :prefix], x[:, prefix:] + vit.take(self.positions, known)]

    def _masks(self, unknown: Tensor) -> Tensor:
        assert self.mask_token is not None, "this decoder was made for tokens of which none is hidden"
        return self.mask_token + vit.take(self.positions, unknown)


class PartialBlock(Block):
    """timm's block, of which the last tokens may be wanted alone: then all of them are keys and values, but only those ask and pass on."""

    def forward(self, x: Tensor, wanted: int | None = None) -> Tensor:  # type: ignore[override]
        """(B, T, D) -> (B, T, D), or (B, wanted, D) the last ones"""
        if wanted is None:
            return super().forward(x)
        attention: Any = self.attn  # timm's
        width, normed = x.shape[2], self.norm1(x)
        (w_q, w_kv), (b_q, b_kv) = attention.qkv.weight.split([width, 2 * width]), attention.qkv.bias.split([width, 2 * width])
        q = rearrange(F.linear(normed[:, -wanted:], w_q, b_q), "b n (h d) -> b h n d", h=attention.num_heads)
        k, v = rearrange(F.linear(normed, w_kv, b_kv), "b n (two h d) -> two b h n d", two=2, h=attention.num_heads)
        x = x[:, -wanted:] + attention.proj(rearrange(attend(q, k, v, fused=attention.fused_attn), "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def attend(q: Tensor, k: Tensor, v: Tensor, *, fused: bool) -> Tensor:
    """Scaled dot-product attention of heads (B, h, T, d), by the fused kernel or product by product."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class CrossDecoder(nn.Module):
    """CrossMAE's: Fu et al., arXiv:2401.14391. Mask tokens ask the visible ones and never each other, so that any number may be predicted.

    Takes the same arguments as Decoder and answers alike; the tokens of known patches pass through undecoded.
    """

    positions: Tensor  # (1, N, width)

    def __init__(self, encoder: Encoder, *, depth: int | str, width: int | str, heads: int | str) -> None:
        super().__init__()
        depth, width, heads = sizes(encoder, depth, width, heads)
        self.embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_table(width, encoder.patch_embed.grid_size), persistent=False)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, mlp_ratio(encoder)) for _ in range(depth))
        self.norm = _norm(width)
        self.pred = nn.Linear(width, vit.patch_values(encoder))
        vit.initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, known: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
        """As Decoder.forward: tokens (B, P + V, D) of prefix and known patches -> ((B, V, width), (B, H, width)), normalised."""
        memory = self._memory(tokens, known)
        return self.norm(memory[:, -known.shape[1] :]), self._ask(memory, unknown)

    def unknown(self, tokens: Tensor, known: Tensor, unknown: Tensor) -> Tensor:
        """Of the same the second part alone, (B, H, width)."""
        return self._ask(self._memory(tokens, known), unknown)

    def _memory(self, tokens: Tensor, known: Tensor) -> Tensor:
        memory = self.embed(tokens)
        prefix = memory.shape[1] - known.shape[1]
        return torch.cat([memory[:, :prefix], memory[:, prefix:] + vit.take(self.positions, known)], dim=1)

    def _ask(self, memory: Tensor, unknown: Tensor) -> Tensor:
        x = self.mask_token + vit.take(self.positions, unknown)
        for block in self.blocks:
            x = block(x, memory)
        return self.norm(x)


class CrossBlock(nn.Module):
    """Attention of queries to a memory, then an MLP, both residual and before them a norm."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.heads, self.fused_attn = heads, True
        self.norm1, self.norm_memory, self.norm2 = _norm(width), _norm(width), _norm(width)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = Mlp(width, int(ratio * width))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Queries (B, Q, width), memory (B, M, width) -> (B, Q, width)"""
        q = rearrange(self.q(self.norm1(x)), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.kv(self.norm_memory(memory)), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        x = x + self.proj(rearrange(attend(q, k, v, fused=self.fused_attn), "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def image_decoder(encoder: Encoder, *, depth: int | str, width: int | str, heads: int | str, inputs: int) -> nn.Module:
    """The decoder that suits an encoder: a module from tokens at every place (B, N, inputs) to images (B, C, H, W).

    Transformer blocks for a ViT; convolutions for `conv`, `depth` blocks at every scale; one layer for `dense` and `linear`.
    """
    if isinstance(encoder, ConvEncoder):
        depth = 1 if depth == "auto" else int(depth)
        if depth < 0:
            raise ConfigError(f"method.decoder_depth {depth} is below 0: leave it at auto")
        return ConvDecoder(encoder, depth=depth, inputs=inputs)
    if isinstance(encoder, DenseEncoder):
        return PatchDecoder(encoder, nn.Linear(inputs, vit.patch_values(encoder)))
    decoder = Decoder(encoder, depth=depth, width=width, heads=heads, inputs=inputs, hides=False)
    return PatchDecoder(encoder, AllPatches(decoder))


class AllPatches(nn.Module):
    """A Decoder for tokens of which none is hidden: (B, P + N, inputs) -> the values of every patch (B, N, p * q * C)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P + N, inputs) -> (B, N, p * q * C)"""
        places = torch.arange(self.decoder.positions.shape[1], device=tokens.device)[None]
        return self.decoder.pred(self.decoder(tokens, places)[0])


class PatchDecoder(nn.Module):
    """Values for every patch by any net, laid out as images."""

    def __init__(self, encoder: Encoder, net: nn.Module) -> None:
        super().__init__()
        self.net, self.grid, self.patch = net, encoder.patch_embed.grid_size, encoder.patch_embed.patch_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, P + N, inputs) -> images (B, C, H, W)."""
        return vit.unpatchify(self.net(tokens), self.grid, self.patch)
