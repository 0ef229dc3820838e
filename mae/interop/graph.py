"""An encoder as a graph of tensor operations that needs none of this project's code: pixels in, vectors out, any number at a time.

And the two halves of an autoencoder that makes latents for diffusion models: pixels in, maps out, and back. A model in float64 gives
graphs in float64.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mae.keys import Data
from mae.methods.base import Autoencoder
from mae.nets import vit
from mae.nets.encoders import Encoder


class Vectors(nn.Module):
    """Images (B, C, H, W), pixels scaled to [0, 1] -> `mean` and, where the encoder has a class token, `cls`, each (B, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, data: Data) -> None:
        super().__init__()
        self.encoder = encoder
        self.pools = ("mean",) if encoder.cls_token is None else ("mean", "cls")
        _register(self, data, like=encoder)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One (B, D) a pool."""
        tokens = self.encoder.forward_features((images - self.mean) / self.std)
        return tuple(vit.pool(self.encoder, tokens, pool) for pool in self.pools)


class ToLatents(nn.Module):
    """Images (B, C, H, W), pixels scaled to [0, 1] -> maps (B, c, h, w) of unit variance: the mean of the code, times its scale."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Autoencoder, data: Data) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model)
        del self.model.decoder
        _register(self, data, like=model)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, c, h, w)"""
        return self.model.latents_for_diffusion((images - self.mean) / self.std)


class ToImages(nn.Module):
    """Maps (B, c, h, w) of unit variance -> images (B, C, H, W), pixels scaled to [0, 1] but for what the decoder overshoots."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Autoencoder, data: Data) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model)
        del self.model.encoder
        _register(self, data, like=model)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, C, H, W)"""
        return self.model.decode_latents(latents) * self.std + self.mean


def _register(module: nn.Module, data: Data, *, like: nn.Module) -> None:
    for name, values in (("mean", data.mean), ("std", data.std)):
        module.register_buffer(name, torch.tensor(values, dtype=next(like.parameters()).dtype).view(-1, 1, 1))


def example(model: Autoencoder, data: Data) -> tuple[Tensor]:
    """Images that show an exporter the shapes."""
    shape = (2, data.channels, *model.encoder.patch_embed.img_size)  # two: one would be taken for a constant
    return (torch.zeros(shape, dtype=next(model.parameters()).dtype),)


def any_number(name: str = "images") -> dict[str, dict[int, torch.export.Dim]]:
    """What of the shapes of an argument may differ."""
    return {name: {0: torch.export.Dim("batch")}}
