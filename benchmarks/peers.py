"""The masked autoencoders that ours is timed beside: transformers' as it is shipped, and a textbook's.

The textbook's is written from the paper (He et al., arXiv:2111.06377) the way such code usually is: every patch is embedded by a
convolution, two sorts make mask and inverse, attention is three operations, every patch is predicted and the loss is masked afterwards.
Its parameters bear the names of the authors' checkpoints, so that mae/interop carries weights over.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """A model to time: the encoder and the decoder that goes with it."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image // self.patch) ** 2


SIZES = {
    "vit_tiny": Size(32, 4, 192, 12, 3, 192, 4, 3),
    "vit_base": Size(224, 16, 768, 12, 12, 512, 8, 16),
    "vit_large": Size(224, 16, 1024, 24, 16, 512, 8, 16),
}


class Attention(nn.Module):
    """Self-attention of the tokens of an image; `fused` is scaled_dot_product_attention, else every product is one of its own."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5
            x = weights.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block, normalised before each part."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, fused), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches to tokens by a convolution."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)"""
        return self.proj(images).flatten(2).transpose(1, 2)


class Textbook(nn.Module):
    """The paper's masked autoencoder with normalised pixels as targets and 75% of the patches hidden."""

    def __init__(self, size: Size, *, fused: bool) -> None:
        super().__init__()
        self.size, self.visible = size, size.patches // 4
        self.patch_embed = PatchEmbed(size.patch, size.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.patches, size.width), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads, fused) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        width = size.decoder_width
        self.decoder_embed = nn.Linear(size.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + size.patches, width), requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(width, size.decoder_heads, fused) for _ in range(size.decoder_depth)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, 3 * size.patch**2)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The loss of images (B, 3, H, W); `noise` (B, N), drawn where none is given, hides the patches where it is highest."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        if noise is None:
            noise = torch.rand(x.shape[:2], device=x.device)
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, : self.visible, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        prediction = self._decode(self.norm(self.blocks(x)), restore)
        target = self._patches(images)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = (prediction - target).square().mean(-1)
        hidden = torch.ones_like(noise)
        hidden[:, : self.visible] = 0
        hidden = hidden.gather(1, restore)
        return (loss * hidden).sum() / hidden.sum()

    def _decode(self, x: Tensor, restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        masks = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], masks.to(x.dtype)], dim=1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def _patches(self, images: Tensor) -> Tensor:
        p, side = self.size.patch, self.size.image // self.size.patch
        x = images.reshape(len(images), 3, side, p, side, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(images), side * side, 3 * p * p)


def transformers_model(size: Size) -> nn.Module:
    """transformers.ViTMAEForPreTraining with random weights, its attention as it comes."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=size.image,
            patch_size=size.patch,
            hidden_size=size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            decoder_hidden_size=size.decoder_width,
            decoder_num_hidden_layers=size.decoder_depth,
            decoder_num_attention_heads=size.decoder_heads,
            decoder_intermediate_size=4 * size.decoder_width,
            norm_pix_loss=True,
            layer_norm_eps=1e-6,
        )
    )


def adamw(model: nn.Module, *, fused: bool | None) -> torch.optim.Optimizer:
    """The paper's optimizer over what is trained; `fused` None is what torch chooses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)


class Stepper:
    """A peer's optimisation step: forward pass under autocast, backward pass, AdamW, all as a script would write it."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype | None,
        fused: bool | None,
        reads_loss: bool,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """`dtype` None is float32; float16 comes with a loss scaler. `reads_loss`: .item() at every step, which waits for a GPU."""
        self.model, self.loss_of, self.dtype, self.reads_loss = model, loss_of, dtype, reads_loss
        self.optimizer = optimizer or adamw(model, fused=fused)
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def __call__(self, images: Tensor) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            loss = self.loss_of(images)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.reads_loss:
            loss.item()
