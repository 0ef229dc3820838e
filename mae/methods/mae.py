"""Masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377.

Most patches are hidden; a ViT encodes the visible ones, a light decoder predicts the pixels of the hidden ones:

    loss = mean over hidden patches of mean over pixels of (prediction - target)^2

The target is the patch itself or, with norm_pix, the patch minus its mean over its standard deviation (unbiased). With
predict_share below 1 only that share of the hidden patches is decoded and predicted (as in CrossMAE, arXiv:2401.14391, whose decoder
differs): the decoder's cost falls with it.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.methods.base import Autoencoder, Output, Reconstruction
from mae.nets import keyed, vit
from mae.nets.decoder import CrossDecoder, Decoder
from mae.nets.masking import SCHEMES, Scheme, Split, split_patches
from mae.nets.sizes import hidden_count


class MAE(Autoencoder):
    """A masked autoencoder around any timm VisionTransformer.

    `norm_pix: auto` normalises targets of patches of at least 16 pixels (fewer leave little but noise); nets/decoder.py says how the
    decoder is sized. Raises ConfigError for a mask ratio that hides none or all of the patches.
    """

    separable = True
    encoder: VisionTransformer
    decoder: Decoder | CrossDecoder

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,
        masking: str = "random",
        norm_pix: bool | str = "auto",
        predict_share: float = 1.0,
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        if not isinstance(encoder, VisionTransformer):
            raise ConfigError(
                f"a masked autoencoder leaves patches out, which {type(encoder).__name__} cannot: choose a ViT as encoder.name"
            )
        self.patch = encoder.patch_embed.patch_size
        self.grid = encoder.patch_embed.grid_size
        self.mask_ratio = mask_ratio
        self.scheme = _scheme(masking)
        self.norm_pix = self.patch[0] * self.patch[1] >= 16 if norm_pix == "auto" else bool(norm_pix)
        self.hidden_count = hidden_count(encoder.patch_embed.num_patches, mask_ratio)
        if not 0 < predict_share <= 1:
            raise ConfigError(f"method.predict_share {predict_share} must be above 0 and at most 1: 1 predicts every hidden patch")
        self.predicted_count = max(round(predict_share * self.hidden_count), 1)

        self.decoder = Decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads)

    def forward(self, images: Tensor, *, keys: Tensor | None = None, noise: Tensor | None = None) -> Output:
        """The loss on hidden patches. `noise` (B, N), where given, fixes the mask instead of the keys: the lowest stay visible."""
        patches = vit.patchify(images, self.patch)  # (B, N, p * q * C)
        visible, hidden = self.split(keys, noise)
        if self.predicted_count < self.hidden_count:
            hidden = self._some(hidden, keys)
        encoded = vit.encode_patches(self.encoder, patches, visible)
        prediction = _float(self.decoder.pred(self.decoder.unknown(encoded, visible, hidden)))  # (B, H, p * q * C)
        target = self.target(vit.take(patches, hidden))
        loss = (prediction - target).square().mean()
        return Output(loss, {})

    def split(self, keys: Tensor | None, noise: Tensor | None = None) -> Split:
        """Which patches are visible and which hidden, by the keys (B,) or by a given noise (B, N)."""
        if noise is None:
            assert keys is not None, "a mask is drawn by keys or given as noise"
            noise = self.scheme(keys, self.grid, self.mask_ratio)
        return split_patches(noise, self.hidden_count)

    def _some(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        """The hidden patches (B, H) that are decoded and predicted in training: a random share, drawn by the keys."""
        if keys is None:  # the mask was given: its order decides
            return hidden[:, : self.predicted_count]
        order = keyed.uniform(keys, hidden.shape[1], "draw").argsort(dim=1, stable=True)
        return hidden.gather(1, order[:, : self.predicted_count])

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder shall predict for patches (..., p * q * C): at least float32, normalised per patch with norm_pix."""
        patches = _float(patches)  # the bf16 variance of a flat patch rounds to zero
        if not self.norm_pix:
            return patches
        values = patches.shape[-1]
        unbiased = (values - 1) / values  # a layer norm divides by the biased deviation; in one pass instead of six
        scale = patches.new_full((values,), unbiased**0.5)
        return F.layer_norm(patches, (values,), weight=scale, eps=1e-6 * unbiased)

    def predict(self, images: Tensor, *, keys: Tensor | None = None, noise: Tensor | None = None) -> Reconstruction:
        """The decoder's prediction for every patch and which ones were hidden (a visible patch's prediction is untrained)."""
        patches = vit.patchify(images, self.patch)
        visible, hidden = self.split(keys, noise)
        encoded = vit.encode_patches(self.encoder, patches, visible)
        # as many at a time as in training: a decoder does worse with more mask tokens than it has ever seen
        parts = [self.decoder(encoded, visible, some) for some in hidden.split(self.predicted_count, dim=1)]
        tokens = torch.cat([parts[0][0], *(part[1] for part in parts)], dim=1)
        order = torch.cat([visible, hidden], dim=1)
        tokens = torch.zeros_like(tokens).scatter(1, order[..., None].expand_as(tokens), tokens)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, hidden, True)
        return Reconstruction(self.decoder.pred(tokens), mask)

    def reconstruct(self, images: Tensor, *, keys: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) with the hidden patches replaced by their reconstruction.

        With norm_pix a patch is un-normalised by statistics of the VISIBLE patches alone (distance-weighted mean of their
        means, mean of their deviations), so that nothing of the target leaks into the picture. Without keys, mask 0 of every image is used.
        """
        if keys is None and noise is None:
            keys = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        prediction, hidden = self.predict(images, keys=keys, noise=noise)
        patches, prediction = _float(vit.patchify(images, self.patch)), _float(prediction)
        if self.norm_pix:
            prediction = prediction * self._visible_deviation(patches, hidden) + self._visible_mean(patches, hidden)
        patches = torch.where(hidden[..., None], prediction, patches)
        return vit.unpatchify(patches, self.grid, self.patch)

    def visible(self, images: Tensor, *, keys: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) with NaN for the hidden patches: what the encoder sees."""
        patches = vit.patchify(images, self.patch)
        hidden = self.split(keys, noise).hidden[..., None].expand(-1, -1, patches.shape[2])
        return vit.unpatchify(patches.scatter(1, hidden, torch.nan), self.grid, self.patch)

    def _visible_mean(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """(B, N, 1): the means of the visible patches, weighted by closeness to each patch."""
        rows, columns = torch.meshgrid(*(torch.arange(n, device=patches.device) for n in self.grid), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
        weights = torch.cdist(places, places).clamp(min=0.5) ** -3 * ~hidden[:, None, :]  # (B, N, N)
        return weights @ patches.mean(-1, keepdim=True) / weights.sum(-1, keepdim=True)

    def _visible_deviation(self, patches: Tensor, hidden: Tensor) -> Tensor:
        """(B, 1, 1): the mean standard deviation of the visible patches."""
        seen = (~hidden)[..., None]
        return (patches.std(-1, keepdim=True) * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ConfigError(f"method.masking {name} is unknown: choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
