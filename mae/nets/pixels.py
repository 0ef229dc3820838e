"""Raw pixels as a vector, reduced where there are too many."""

from torch import Tensor
from torch.nn import functional as F


def reduced(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C * h * w) with h, w at most `side` pixels, averaged over what is left out."""
    size = tuple(min(n, side) for n in images.shape[2:])
    if size != images.shape[2:]:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.flatten(1)
