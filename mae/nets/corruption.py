"""Ways to spoil an image, each a pure function of the images and of one key a sample: Vincent et al., JMLR 11 (2010).

All take images (B, C, H, W), keys (B,) int64 and a strength, and give images of the same shape and type. Pixels are meant to be
normalised: their mean is 0, which is what a dropped one becomes, and their standard deviation is 1, in which Gaussian noise is measured.
"""

import torch
from torch import Tensor, nn

from mae.nets import keyed, vit
from mae.nets.snapshot import snapshot
from mae.nets.statistics import global_mean


def gaussian(images: Tensor, keys: Tensor, strength: float) -> Tensor:
    """Adds noise of standard deviation `strength` to every value."""
    noise = keyed.normal(keys, images[0].numel(), "noise").view(images.shape)
    return images + strength * noise.to(images.dtype)


def pixel_dropout(images: Tensor, keys: Tensor, strength: float) -> Tensor:
    """Sets a share `strength` of the pixels, all channels of a pixel together, to 0."""
    return images.masked_fill(_places(images, keys) < strength, 0)


def patch_dropout(images: Tensor, keys: Tensor, strength: float, *, patch: tuple[int, int]) -> Tensor:
    """Sets a share `strength` of the patches to 0."""
    patches = vit.patchify(images, patch)  # (B, N, p * q * C)
    dropped = keyed.uniform(keys, patches.shape[1], "mask") < strength
    grid = images.shape[2] // patch[0], images.shape[3] // patch[1]
    return vit.unpatchify(patches.masked_fill(dropped[..., None], 0), grid, patch)


def salt_pepper(images: Tensor, keys: Tensor, strength: float) -> Tensor:
    """Sets a share `strength` of the pixels to the image's own darkest or brightest value of each channel, half of them each."""
    place = _places(images, keys)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(place < strength / 2, low, torch.where(place < strength, high, images))


def _places(images: Tensor, keys: Tensor) -> Tensor:
    """A uniform number for every pixel: (B, 1, H, W)."""
    height, width = images.shape[2:]
    return keyed.uniform(keys, height * width, "mask").view(-1, 1, height, width)


class PatchPCA(nn.Module):
    """Noise in the principal components of the patches alone: the noise of l-DAE, Chen et al., arXiv:2401.14404.

    `forward(images, keys, strength)` adds, in every patch, strength * r * sum_j eps_j v_j over the first `components` principal
    directions v_j, where r is the root of their mean variance: strength 1 is as much noise as there is signal in those directions.
    The other components stay as they are (l-DAE drops them), so that strength 0 is the identity and every weight of the patch
    embedding is trained: the encoder shall work on clean images.

    The directions come from training itself, without a pass beforehand: `update` keeps the mean covariance of all patches seen and
    turns the directions towards its eigenvectors by one step of orthogonal iteration a batch (Golub & Van Loan, section 8.2.4), which
    has no branches, costs one product of patches and is the same on all ranks. Both settle as batches are averaged.
    """

    batches: Tensor
    mean: Tensor
    covariance: Tensor
    directions: Tensor

    def __init__(self, *, patch: tuple[int, int], values: int, components: int) -> None:
        super().__init__()
        self.patch = patch
        start = keyed.normal(torch.arange(values), components, "noise")
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("covariance", torch.zeros(values, values))
        self.register_buffer("directions", torch.linalg.qr(start).Q)  # (values, components), orthonormal columns

    @torch.no_grad()
    def update(self, images: Tensor) -> None:
        """Takes a clean batch (B, C, H, W) into the covariance and turns the directions."""
        with torch.autocast(images.device.type, enabled=False):
            patches = vit.patchify(images, self.patch).flatten(0, 1).to(self.mean.dtype)
            self.batches += 1
            # Welford's update of a mean over batches: the old mean's distance to the new batch is variance as well
            share = 1 / self.batches
            mean = global_mean(patches.mean(0))
            spread = global_mean((patches - mean).T @ (patches - mean) / len(patches))
            moved = mean - self.mean
            self.covariance.lerp_(spread + (1 - share) * torch.outer(moved, moved), share)
            self.mean.lerp_(mean, share)
            self.directions.copy_(torch.linalg.qr(self.covariance @ self.directions).Q)

    @torch.no_grad()
    def forward(self, images: Tensor, keys: Tensor, strength: float) -> Tensor:
        """Images (B, C, H, W) with noise in the principal components of every patch."""
        with torch.autocast(images.device.type, enabled=False):
            rows, columns = images.shape[2] // self.patch[0], images.shape[3] // self.patch[1]
            components = self.directions.shape[1]
            variance = torch.einsum("vc,vw,wc->", self.directions, self.covariance, self.directions) / components
            noise = keyed.normal(keys, rows * columns * components, "noise").view(len(images), -1, components)
            noise = strength * variance.clamp(min=0).sqrt() * noise.to(self.directions.dtype) @ self.directions.T
            return snapshot(images + vit.unpatchify(noise, (rows, columns), self.patch).to(images.dtype))
