"""What one image costs a masked autoencoder, by formula: parameters, floating-point operations, activations kept for the backward pass.

The encoder sees the visible patches, the decoder visible and hidden ones, its last block's queries and MLP and the prediction the hidden
ones. A block of width D with an MLP of
width M over T tokens takes T (4 D^2 + 2 D M) multiplications with weights and 2 T^2 D of attention. It keeps what its backward pass reads,
counted operation by operation as in Korthikanti et al., arXiv:2205.05198, section 4 (theirs has dropout and 16-bit residuals: 34 D bytes
a token where M = 4 D; ours, without dropout and with the residuals in float32, keeps 36 D under bf16 and 64 D in float32).
"""

from dataclasses import dataclass, replace
from typing import Any

from mae.methods.base import Autoencoder

STATISTICS = 4  # numbers a token that a block's two norms keep: mean and deviation each


@dataclass(frozen=True)
class Stack:
    """Transformer blocks in a row. In a cross-attending one, queries ask a memory and never each other."""

    width: int
    depth: int
    heads: int
    hidden: int  # width of a block's MLP
    cross: bool = False

    @property
    def block(self) -> int:
        """Parameters of a block: attention and MLP with biases, and the norms."""
        attention = 4 * self.width**2 + 4 * self.width
        return attention + 2 * self.width * self.hidden + self.hidden + self.width + (6 if self.cross else 4) * self.width

    def flops(self, tokens: int, memory: int = 0, *, wanted: int | None = None) -> float:
        """FLOPs of a forward pass over an image's tokens; a cross-attending stack asks `memory` other ones.

        Of the last block only `wanted` tokens may be: the others are then keys and values alone.
        """
        d, keys = self.width, memory if self.cross else tokens
        asking = 2 * d**2 + 2 * d * self.hidden + 2 * keys * d  # a token: query and projection; the MLP; attention
        spared = 0 if wanted is None else 2 * (tokens - wanted) * asking
        return self.depth * 2 * (tokens * asking + keys * 2 * d**2) - spared

    def kept(self, tokens: int, memory: int = 0, *, half: bool, fused: bool, wanted: int | None = None) -> float:
        """Bytes of activations that one block keeps for an image. Unfused attention keeps its (T, T) maps, fused one a number a row."""
        d, keys, asking = self.width, memory if self.cross else tokens, tokens if wanted is None else wanted
        low = 2 if half else 4
        own = 4 * (tokens + asking) * (d + STATISTICS // 2)  # the residual before each norm
        own += low * tokens * d + low * asking * (3 * d + 2 * self.hidden)  # normed twice, query, attended; around the activation
        own += low * asking * d if wanted is not None else 0  # those normed tokens that ask, side by side
        own += low * keys * (3 * d if self.cross else 2 * d)  # keys, values; of a memory its norm too
        if self.cross:
            own += 8 * keys
        return own + (4 * asking * self.heads if fused else low * self.heads * asking * keys)

    def produced(self, tokens: int, memory: int = 0, *, half: bool, fused: bool, wanted: int | None = None) -> float:
        """Bytes that one block keeps for an image of its input and what comes out of matrix products and attention, and no more."""
        d, keys, asking = self.width, memory if self.cross else tokens, tokens if wanted is None else wanted
        low = 2 if half else 4
        own = 4 * tokens * d + low * keys * 2 * d  # the input; keys and values
        own += low * asking * (4 * d + self.hidden)  # query, attended, projected; the MLP's two layers
        return own + (4 * asking * self.heads if fused else low * self.heads * asking * keys)


@dataclass(frozen=True)
class Shape:
    """A masked autoencoder as its costs see it."""

    encoder: Stack
    decoder: Stack
    patches: int
    visible: int
    predicted: int  # hidden patches that are decoded in training
    prefix: int  # class and register tokens
    values: int  # numbers of a patch

    @property
    def positions(self) -> int:
        """Entries of the encoder's position table, which are parameters without gradient."""
        return (self.patches + self.prefix) * self.encoder.width

    @property
    def encoder_parameters(self) -> int:
        """Parameters of the encoder, the position table among them."""
        e = self.encoder
        return e.depth * e.block + self.values * e.width + e.width + self.prefix * e.width + self.positions + 2 * e.width

    @property
    def parameters(self) -> int:
        """Parameters of encoder and decoder."""
        e, d = self.encoder, self.decoder
        ends = e.width * d.width + d.width + d.width + 2 * d.width + d.width * self.values + self.values
        return self.encoder_parameters + d.depth * d.block + ends

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        return self.parameters - self.positions

    @property
    def matrices(self) -> int:
        """Those of the parameters that autocast copies into half precision: the matrices of linear layers."""
        e, d = self.encoder, self.decoder
        blocks = (s.depth * (4 * s.width**2 + 2 * s.width * s.hidden) for s in (e, d))
        return sum(blocks) + self.values * (e.width + d.width) + e.width * d.width

    @property
    def known(self) -> int:
        """Tokens that the encoder sees."""
        return self.prefix + self.visible

    @property
    def decoded(self) -> int:
        """Tokens that pass through the decoder's blocks."""
        return self.predicted if self.decoder.cross else self.known + self.predicted

    @property
    def forward_flops(self) -> float:
        """FLOPs of a forward pass for one image."""
        e, d = self.encoder, self.decoder
        ends = self.known * e.width * d.width + self.predicted * d.width * self.values
        return e.flops(self.known) + d.flops(self.decoded, self.known, wanted=self._wanted) + 2 * ends + self._embedding

    @property
    def flops(self) -> float:
        """FLOPs of a training step for one image, without optimizer and recomputation: three times the forward pass."""
        return 3 * self.forward_flops - self._embedding  # no gradient is asked of the pixels

    @property
    def _wanted(self) -> int | None:
        """Tokens that the decoder's last block gives, where those are not all."""
        return None if self.decoder.cross else self.predicted

    @property
    def _embedding(self) -> float:
        return 2.0 * self.visible * self.values * self.encoder.width

    def activations(self, *, half: bool, fused: bool = True, recompute: bool | str = False) -> float:
        """Bytes kept between forward and backward pass for one image. `recompute` as in train.recompute: each block's input (True) or also
        what comes out of its products (selective), and the largest block whole.
        """
        low = 2 if half else 4
        stacks = ((self.encoder, self.known, 0), (self.decoder, self.decoded, self.known))
        blocks = [stack.kept(tokens, memory, half=half, fused=fused) for stack, tokens, memory in stacks]
        last = self.decoder.kept(self.decoded, self.known, half=half, fused=fused, wanted=self._wanted)
        if recompute == "selective":
            made = [stack.produced(tokens, memory, half=half, fused=fused) for stack, tokens, memory in stacks]
            final = self.decoder.produced(self.decoded, self.known, half=half, fused=fused, wanted=self._wanted)
            again = max(block - products for block, products in zip(blocks, made, strict=True))
            kept = sum(stack.depth * block for (stack, _, _), block in zip(stacks, made, strict=True)) + final - made[1] + again
        elif recompute:
            kept = sum(4 * stack.depth * tokens * stack.width for stack, tokens, _ in stacks) + max(blocks)
        else:
            kept = sum(stack.depth * block for (stack, _, _), block in zip(stacks, blocks, strict=True)) + last - blocks[1]
        norms = 4 * (self.known * self.encoder.width + self.predicted * self.decoder.width)
        norms += 4 * self.known * self.decoder.width if self.decoder.cross else 0  # the memory, which every block norms anew
        inputs = low * (self.visible * self.values + self.known * self.encoder.width + self.predicted * self.decoder.width)
        return kept + norms + inputs + 4 * self.predicted * self.values  # the last: the error, whose square is the loss


def shape_of(method: Autoencoder) -> Shape:
    """The shape of a built MAE or CrossMAE (its weights may be on torch's meta device).

    Raises ValueError for a method or an encoder that is made of other parts than those counted here.
    """
    encoder, decoder = method.encoder, getattr(method, "decoder", None)
    if not hasattr(method, "predicted_count") or decoder is None or not len(encoder.blocks) * len(decoder.blocks):
        raise ValueError(f"{type(method).__name__} is no masked autoencoder")
    theirs: Any = encoder.blocks[0]  # timm's
    ours = decoder.blocks[0]
    shape = Shape(
        encoder=_stack(theirs, len(encoder.blocks), encoder.embed_dim, theirs.attn.num_heads),
        decoder=_stack(ours, len(decoder.blocks), decoder.embed.out_features, ours.attn.num_heads if hasattr(ours, "attn") else ours.heads),
        patches=encoder.patch_embed.num_patches,
        visible=encoder.patch_embed.num_patches - method.hidden_count,
        predicted=method.predicted_count,
        prefix=encoder.num_prefix_tokens,
        values=decoder.pred.out_features,
    )
    shape = replace(shape, decoder=replace(shape.decoder, cross=not hasattr(ours, "attn")))
    if shape.parameters != sum(p.numel() for p in method.parameters()):
        raise ValueError("the encoder is no plain ViT: it has parts that the formulas do not know")
    return shape


def _stack(block: Any, depth: int, width: int, heads: int) -> Stack:
    return Stack(width=width, depth=depth, heads=heads, hidden=block.mlp.fc1.out_features)
