"""Principal components: Pearson, Phil. Mag. 2 (1901). The best linear autoencoder, in closed form.

The covariance is summed in one pass over the images and decomposed: exact. Images of more than 4,096 values, whose covariance would not
fit, are taken in by an incremental decomposition (Ross et al., IJCV 77, 2008), which keeps a few more directions than asked for.
"""

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.methods.base import Autoencoder, Batches, Diagnosis
from mae.nets.encoders import Encoder

EXACT = 4096  # values of an image: up to here the covariance is summed whole
SPARE = 32  # directions kept beyond those asked for, by the incremental decomposition


class PCA(Autoencoder):
    """Projects on the `components` directions of largest variance. Raises ConfigError for more of them than an image has values."""

    learns = False
    mean: Tensor
    directions: Tensor
    variances: Tensor

    def __init__(self, encoder: Encoder, *, components: int = 32) -> None:
        super().__init__(encoder)
        size = encoder.patch_embed.img_size
        self.shape = (encoder.patch_embed.proj.in_channels, *size)
        values = prod(self.shape)
        if not 0 < components <= values:
            raise ConfigError(f"method.components {components} is not a number from 1 to the {values} values of an image")
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("directions", torch.eye(components, values))  # (k, D), orthonormal rows, largest variance first
        self.register_buffer("variances", torch.zeros(components))  # of the training images along them

    def fit(self, batches: Batches) -> None:
        """One pass over images (B, C, H, W): mean, directions and variances. Raises ConfigError for fewer images than components."""
        rows = (images.flatten(1).double() for images, _ in batches)
        count, k = 0, len(self.directions)
        if len(self.mean) <= EXACT:
            count, mean, directions, variances = _exact(rows)
        else:
            count, mean, directions, variances = _incremental(rows, k + SPARE)
        if count <= k:
            raise ConfigError(f"method.components {k} needs more training images than the {count} there are: try {max(count - 1, 1)}")
        self.mean.copy_(mean)
        self.directions.copy_(directions[:k])
        self.variances.copy_(variances[:k])

    def latent(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, components)."""
        with torch.autocast(images.device.type, enabled=False):  # exact in float32, whatever precision the encoders are read in
            return (images.float().flatten(1) - self.mean) @ self.directions.T

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """The components (B, k), for every pool."""
        return self.latent(images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, components) -> images (B, C, H, W)."""
        return (latents @ self.directions + self.mean).unflatten(1, self.shape)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as the components tell them."""
        return self.decode(self.latent(images))

    def diagnose(self, batches: Batches) -> Diagnosis:
        """How many directions carry variance."""
        used = int((self.variances > 1e-9 * self.variances.max().clamp(min=1e-30)).sum())
        alarms = [] if used == len(self.variances) else [f"only {used} of {len(self.variances)} components vary: lower method.components"]
        return Diagnosis({"components_used": float(used)}, alarms)


def _exact(rows: Iterable[Tensor]) -> tuple[int, Tensor, Tensor, Tensor]:
    """(count, mean (D,), directions (D, D), variances (D,)) of rows (B, D) in batches."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    shift: Tensor | None = None
    for x in rows:
        shift = x.mean(0) if shift is None else shift  # near the mean, so that the difference of large sums loses nothing
        x = x - shift
        count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
    assert shift is not None, "there were no images"
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / max(count - 1, 1)
    variances, vectors = torch.linalg.eigh(covariance)
    return count, mean + shift, vectors.T.flip(0), variances.flip(0).clamp(min=0)


def _incremental(rows: Iterable[Tensor], keep: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """The same with the first `keep` directions, nearly; memory for a batch and those directions."""
    count, mean = 0, torch.zeros(())
    scaled: Tensor | None = None  # (keep, D), directions times singular values
    for x in rows:
        moved = x.mean(0) - mean
        parts = [x - x.mean(0), (count * len(x) / (count + len(x))) ** 0.5 * moved[None]]
        _, values, vectors = torch.linalg.svd(torch.cat([*([scaled] if scaled is not None else []), *parts]), full_matrices=False)
        scaled = values[:keep, None] * vectors[:keep]
        mean, count = mean + moved * (len(x) / (count + len(x))), count + len(x)
    assert scaled is not None, "there were no images"
    values = scaled.norm(dim=1)
    return count, mean, scaled / values.clamp(min=1e-30)[:, None], values.square() / max(count - 1, 1)
