"""Raw pixels as features: the control that every representation has to beat."""

from torch import Tensor
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.methods.base import Autoencoder


class Pixels(Autoencoder):
    """The image itself, reduced to at most `side` pixels a side. Raises ConfigError for a side below 1."""

    learns = False

    def __init__(self, encoder, *, side: int = 32) -> None:  # type: ignore[no-untyped-def]
        super().__init__(encoder)
        if side < 1:
            raise ConfigError(f"method.side {side} leaves no pixel: choose one from 1")
        self.side = side

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """(B, C, H, W) -> (B, C * h * w) with h, w at most `side`; the same for every pool."""
        size = tuple(min(n, self.side) for n in images.shape[2:])
        if size != images.shape[2:]:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images.flatten(1)
