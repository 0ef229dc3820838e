"""An encoder as a graph of tensor operations that needs none of this project's code: pixels in, vectors out, any number at a time."""

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
        for name, values in (("mean", data.mean), ("std", data.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One (B, D) a pool."""
        tokens = self.encoder.forward_features((images - self.mean) / self.std)
        return tuple(vit.pool(self.encoder, tokens, pool) for pool in self.pools)


def example(model: Autoencoder, data: Data) -> tuple[Tensor]:
    """Images that show an exporter the shapes."""
    return (torch.zeros(2, data.channels, *model.encoder.patch_embed.img_size),)  # two: one would be taken for a constant


def any_number() -> dict[str, dict[int, torch.export.Dim]]:
    """What of the shapes may differ."""
    return {"images": {0: torch.export.Dim("batch")}}
