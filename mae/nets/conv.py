"""Encoders without attention: residual convolutions after latent diffusion's autoencoder (Rombach et al., arXiv:2112.10752), and one layer.

They answer as timm's VisionTransformer does: `embed_dim`, `patch_embed`, `blocks`, `num_prefix_tokens`, `forward_features`. A place of
their last map is a token.
"""

from functools import partial
from itertools import pairwise

from einops import rearrange
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.nets import vit
from mae.nets.sizes import grid


class PatchEmbed(nn.Module):
    """The first convolution, and the facts about patches that timm's PatchEmbed tells."""

    def __init__(self, image_size: tuple[int, int], patch_size: tuple[int, int], proj: nn.Conv2d) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.proj = image_size, patch_size, proj
        self.grid_size = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]


class Encoder(nn.Module):
    """What both have in common with a VisionTransformer."""

    num_prefix_tokens = 0
    cls_token = reg_token = None


class ConvEncoder(Encoder):
    """Images (B, C, H, W) -> tokens (B, H / f * W / f, embed_dim): `depth` residual blocks at every scale, halved until 1 / f.

    f = patch_size, a power of two. GroupNorm keeps samples independent of their batch. Raises ConfigError for another f.
    """

    def __init__(self, image_size: tuple[int, int], channels: int, *, patch_size: int, embed_dim: int, depth: int) -> None:
        super().__init__()
        widths = scale_widths(patch_size, embed_dim)
        grid(image_size, patch_size)
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(image_size, (patch_size, patch_size), nn.Conv2d(channels, widths[0], 3, padding=1))
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(widths):
            scale = [Residual(narrow) for _ in range(depth)]
            self.blocks.append(nn.Sequential(*scale, nn.Conv2d(narrow, wide, 3, stride=2, padding=1)))
        self.blocks.append(nn.Sequential(*(Residual(widths[-1]) for _ in range(depth))))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, embed_dim), places row by row, normalised."""
        x = self.patch_embed.proj(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(rearrange(x, "b d h w -> b (h w) d"))


class DenseEncoder(Encoder):
    """One layer on all pixels at once: images (B, C, H, W) -> one token (B, 1, embed_dim), through a sigmoid or as it is."""

    def __init__(self, image_size: tuple[int, int], channels: int, *, embed_dim: int, sigmoid: bool) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(image_size, image_size, nn.Conv2d(channels, embed_dim, image_size, stride=image_size))
        self.blocks = nn.ModuleList()
        self.norm = nn.Sigmoid() if sigmoid else nn.Identity()
        vit.initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, embed_dim)"""
        return self.norm(self.patch_embed.proj(images).flatten(2).mT)


class ConvDecoder(nn.Module):
    """Tokens (B, N, inputs) -> images (B, C, H, W): the encoder's scales in reverse, with `depth` residual blocks each."""

    def __init__(self, encoder: ConvEncoder, *, depth: int, inputs: int) -> None:
        super().__init__()
        widths = scale_widths(encoder.patch_embed.patch_size[0], encoder.embed_dim)[::-1]
        self.rows = encoder.patch_embed.grid_size[0]
        self.embed = nn.Conv2d(inputs, widths[0], 1)
        scales = []
        for wide, narrow in pairwise(widths):
            scales += [*(Residual(wide) for _ in range(depth)), nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1)]
        self.blocks = nn.Sequential(*scales, *(Residual(widths[-1]) for _ in range(depth)))
        self.pred = nn.Sequential(_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], encoder.patch_embed.proj.in_channels, 3, padding=1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, inputs) -> (B, C, H, W)"""
        return self.pred(self.blocks(self.embed(rearrange(tokens, "b (h w) d -> b d h w", h=self.rows))))


class Residual(nn.Module):
    """x + two 3 x 3 convolutions, each after GroupNorm and SiLU; the second starts at zero, so that a deep stack starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolution = partial(nn.Conv2d, width, width, 3, padding=1)
        first, last = convolution(), convolution()
        self.change = nn.Sequential(_norm(width), nn.SiLU(), first, _norm(width), nn.SiLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same shape"""
        return x + self.change(x)


def scale_widths(patch_size: int, embed_dim: int) -> list[int]:
    """The widths at scales 1, 1/2 ... 1/f: embed_dim at the last, half at each finer one, at least 16."""
    halvings = patch_size.bit_length() - 1
    if 2**halvings != patch_size:
        raise ConfigError(f"encoder.patch_size {patch_size} must be a power of two for convolutions, which halve: try {2**halvings}")
    return [max(embed_dim >> (halvings - i), min(16, embed_dim)) for i in range(halvings + 1)]


def _norm(width: int) -> nn.GroupNorm:
    groups = max(g for g in (8, 4, 2, 1) if width % g == 0)
    return nn.GroupNorm(groups, width, eps=1e-6)
