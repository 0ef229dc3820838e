"""Denoising autoencoder: Vincent et al., "Stacked Denoising Autoencoders", JMLR 11 (2010).

The image is corrupted, all its tokens are encoded, and a light decoder makes ALL pixels of the clean image:

    loss = mean over the batch of sum over pixels of (image - decode(encode(corrupt(image))))^2

The corruption is the regulariser, no bottleneck is needed: too weak a one leaves a plain autoencoder, which learns the identity.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.methods import losses
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output
from mae.nets import corruption as corruptions
from mae.nets import vit
from mae.nets.decoder import image_decoder
from mae.nets.encoders import Encoder

# By name, for normalised pixels. Noise of one standard deviation is 0.2 to 0.4 of pixels in [0, 1].
STRENGTHS = {"gaussian": 1.0, "pixel_dropout": 0.5, "patch_dropout": 0.5, "salt_pepper": 0.25, "patch_pca": 1.0}
SHARES = ("pixel_dropout", "patch_dropout", "salt_pepper")  # of pixels or patches: strength is below 1
LARGEST_PATCH = 4096  # values: the covariance of larger ones does not fit beside a model


class Denoising(Autoencoder):
    """A denoising autoencoder; `corruption` names a way of nets/corruption.py.

    Raises ConfigError for an unknown corruption, a strength that corrupts nothing or everything, and patches that do not suit it.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        corruption: str = "gaussian",
        strength: float | str = "auto",
        pca_components: int | str = "auto",
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        if corruption not in STRENGTHS:
            raise ConfigError(f"method.corruption {corruption} is unknown: choose one of {', '.join(STRENGTHS)}")
        self.strength = STRENGTHS[corruption] if strength == "auto" else float(strength)
        self.shares = corruption in SHARES
        if not 0 < self.strength < (1 if self.shares else float("inf")):
            span = "a share, between 0 and 1" if self.shares else "a standard deviation, above 0"
            raise ConfigError(f"method.strength {strength} of {corruption} must be {span}: try {STRENGTHS[corruption]}")
        self.name = corruption
        self.corruption = _corruption(encoder, corruption, pca_components)
        self.batch_statistics = isinstance(self.corruption, corruptions.PatchPCA)
        self.separable = not self.batch_statistics
        self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=encoder.embed_dim)

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of the clean images (B, C, H, W), corrupted as the keys say."""
        if self.training and isinstance(self.corruption, corruptions.PatchPCA):
            self.corruption.update(images)
        corrupted = self.corrupt(images, keys=keys)
        loss = losses.squared_error(self.reconstruct(corrupted), images)
        copied = losses.squared_error(corrupted, images)
        values = images[0].numel()
        return Output(loss, {"loss_per_pixel": loss.detach() / values, "corruption_per_pixel": copied.detach() / values})

    def corrupt(self, images: Tensor, *, keys: Tensor, strength: float | None = None) -> Tensor:
        """What the encoder sees in training of images (B, C, H, W), at the method's own strength or another."""
        return self.corruption(images, keys, self.strength if strength is None else strength)

    def reconstruct(self, images: Tensor) -> Tensor:
        """The clean images (B, C, H, W) behind corrupted ones."""
        return self.decoder(self.encoder.forward_features(images))

    @torch.no_grad()
    def diagnose(self, batches: Batches) -> Diagnosis:
        """The share of the held-out variance that is explained at three strengths, beside what copying the input explains."""
        strengths = self.strength / 2, self.strength, (1 + self.strength) / 2 if self.shares else self.strength * 2
        errors = {(made, strength): torch.zeros(()) for made in ("denoising", "copying") for strength in strengths}
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for images, keys in batches:
            clean = images.double()
            count, total, squares = count + len(clean), total + clean.sum(0), squares + clean.square().sum()
            for strength in strengths:
                corrupted = self.corrupt(images, keys=keys, strength=strength)
                errors["denoising", strength] += (self.reconstruct(corrupted).double() - clean).square().sum()
                errors["copying", strength] += (corrupted.double() - clean).square().sum()
        variance = (squares - total.square().sum() / count).clamp(min=1e-12)
        explained = {key: float(1 - error / variance) for key, error in errors.items()}
        figures = {f"{made}_r2_{strength:g}": value for (made, strength), value in explained.items()}
        return Diagnosis(figures, self._alarms(explained["denoising", self.strength], explained["copying", self.strength]))

    def _alarms(self, made: float, copied: float) -> list[str]:
        alarms, how = [], f"{self.name} of strength {self.strength:g}"
        if made <= 0:
            alarms.append(f"under {how} its images are no better than the mean image: train for longer or lower method.strength")
        elif made <= copied:
            alarms.append(
                f"under {how} it explains {100 * made:.0f}% of the variance and copying the corrupted image {100 * copied:.0f}%: "
                "train for longer or raise method.strength"
            )
        if copied > 0.99:
            alarms.append(f"{how} hardly changes an image, so that the identity is learnt: raise method.strength")
        return alarms


def _corruption(encoder: Encoder, name: str, components: int | str) -> Callable[[Tensor, Tensor, float], Tensor]:
    patch, values = encoder.patch_embed.patch_size, vit.patch_values(encoder)
    if name == "patch_dropout":
        if encoder.patch_embed.num_patches == 1:
            raise ConfigError("method.corruption patch_dropout would drop whole images, which are one patch here: choose pixel_dropout")
        return partial(corruptions.patch_dropout, patch=patch)
    if name != "patch_pca":
        return getattr(corruptions, name)
    if values > LARGEST_PATCH:
        raise ConfigError(f"method.corruption patch_pca takes patches of at most {LARGEST_PATCH} values, not {values}: choose gaussian")
    components = min(16, max(values // 2, 1)) if components == "auto" else int(components)
    if not 0 < components <= values:
        raise ConfigError(f"method.pca_components {components} must be from 1 to {values}, the values of a patch: try {min(16, values)}")
    return corruptions.PatchPCA(patch=patch, values=values, components=components)
