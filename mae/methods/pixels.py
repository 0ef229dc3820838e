"""Raw pixels as features: the control that every representation has to beat."""

from torch import Tensor

from mae.methods.base import Autoencoder
from mae.nets.encoders import Encoder
from mae.nets.pixels import reduced


class Pixels(Autoencoder):
    """The image itself, reduced to at most `side` pixels a side."""

    learns = False

    def __init__(self, encoder: Encoder, *, side: int = 32) -> None:
        super().__init__(encoder)
        self.side = side

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """(B, C, H, W) -> (B, C * h * w) with h, w at most `side`; the same for every pool."""
        return reduced(images, self.side)
