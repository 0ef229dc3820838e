"""KL autoencoder, the first stage of latent diffusion: Rombach et al., arXiv:2112.10752, section 3.1 and appendix G.

Every place of the encoder's grid keeps a Gaussian code of few channels, f = encoder.patch_size times coarser than the image
(f = 4, 8, 16: encoder.name=conv encoder.patch_size=8), so that a diffusion model may work on codes in place of pixels:

    loss = sum over pixels of (|x - decode(z)| / s + log s) + kl_weight * KL(q(z|x) || N(0, 1)),   log s learnt

averaged over images. The KL weighs so little that it only keeps codes from drifting; their scale is whatever comes out, and
`scale_factor` = 1 / std(z) brings them to the unit variance that diffusion expects. The paper's perceptual and adversarial terms need
weights of other networks and are left out: reconstructions are smoother than theirs at the same f. Nothing can be drawn from this
method itself, which is why it has no `sample`: that is the diffusion model's part.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output, code_rank
from mae.nets import vit
from mae.nets.bottleneck import Bottleneck
from mae.nets.decoder import image_decoder
from mae.nets.encoders import Encoder
from mae.nets.gaussian import Gaussian, gaussian
from mae.nets.statistics import global_mean

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
QUIET = -4.0  # log-variance of every code at the start
DECAY = 0.99  # of the running moments of z
OFF_SCALE = 1.25  # latents scaled to a deviation further from 1 than this factor are worth an alarm


class KLAE(Autoencoder):
    """`latent_channels` numbers a place; `auto` is 4, the paper's for f = 8, and at most a quarter of a patch's values.

    Raises ConfigError for a code with as many numbers as the image and an unknown loss.
    """

    moments: Tensor
    steps: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        latent_channels: int | str = "auto",
        loss: str = "l1",
        kl_weight: float = 1e-6,
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        if loss not in LOSSES:
            raise ConfigError(f"method.loss {loss} is unknown: choose one of {', '.join(LOSSES)}")
        channels = _channels(vit.patch_values(encoder), encoder.embed_dim, latent_channels)
        self.error, self.kl_weight = LOSSES[loss], kl_weight
        self.grid = encoder.patch_embed.grid_size
        self.bottleneck = Bottleneck(encoder, kind="token", size=channels, width=encoder.embed_dim, moments=2)
        with torch.no_grad():  # codes that start amid noise of their own size may sink in it for good: the KL is too weak to call it back
            self.bottleneck.squeeze.weight[channels:] = 0
            self.bottleneck.squeeze.bias[channels:] = QUIET
        self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=encoder.embed_dim)
        self.log_scale = nn.Parameter(torch.zeros(()))  # log s: the error a pixel that the decoder is expected to make
        self.register_buffer("moments", torch.tensor([0.0, 1.0]))  # running means of z and of z^2
        self.register_buffer("steps", torch.zeros(()))  # training steps taken

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of images (B, C, H, W); the keys decide the posterior's noise."""
        posterior = self.posterior(images)
        z = posterior.sample(keys)
        made = self.decoder(self.bottleneck.decode(z)).float()
        error = self.error(made, images.float())  # a pixel
        kl = posterior.kl().flatten(1).sum(1).mean()
        loss = images[0].numel() * (error * (-self.log_scale).exp() + self.log_scale) + self.kl_weight * kl
        if self.training:
            self._count(z.detach())
        metrics = {"loss_per_pixel": loss / images[0].numel(), "error_per_pixel": error, "kl": kl, "scale_factor": self.scale_factor}
        return Output(loss, {name: value.detach() for name, value in metrics.items()})

    @property
    def scale_factor(self) -> Tensor:
        """1 / std(z), a scalar: over the last hundred or so training steps, or over the images that `fit_scale` was given."""
        mean, square = self.moments
        return (square - mean.square()).clamp(min=1e-12).rsqrt()

    def posterior(self, images: Tensor) -> Gaussian:
        """q(z|x) of images (B, C, H, W): a Gaussian over (B, N, c)."""
        return self._posterior(self.encoder.forward_features(images))

    def code(self, tokens: Tensor) -> Tensor:
        """The posterior mean (B, N, c), places row by row, as it comes, of the encoder's tokens (B, P + N, D)."""
        return self._posterior(tokens).mean

    def decode(self, latents: Tensor) -> Tensor:
        """Codes (B, N, c) as they come -> images (B, C, H, W)."""
        return self.decoder(self.bottleneck.decode(latents))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) from their posterior mean."""
        return self.decode(self.latent(images))

    @torch.no_grad()
    def latents_for_diffusion(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) -> maps (B, c, H / f, W / f) of unit variance: the posterior mean, or a sample by the keys (B,)."""
        posterior = self.posterior(images)
        z = posterior.mean if keys is None else posterior.sample(keys)
        return self.scale_factor * rearrange(z, "b (h w) c -> b c h w", h=self.grid[0])

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Maps (B, c, H / f, W / f) of about unit variance, such as a diffusion model draws -> images (B, C, H, W)."""
        return self.decode(rearrange(latents / self.scale_factor, "b c h w -> b (h w) c"))

    @torch.no_grad()
    def fit_scale(self, batches: Batches) -> Tensor:
        """Sets the scale factor to 1 / std(z) over all of these (images, keys), and returns it."""
        self.moments.copy_(_moments(self.posterior(images).sample(keys) for images, keys in batches))
        return self.scale_factor

    @torch.no_grad()
    def diagnose(self, batches: Batches) -> Diagnosis:
        """Whether held-out codes fill their channels, at the scale that is exported."""
        found = [(self.posterior(images), keys) for images, keys in batches]
        rank = code_rank(posterior.mean for posterior, _ in found)
        mean, square = _moments(posterior.sample(keys) for posterior, keys in found)
        scaled = float((square - mean.square()).clamp(min=0).sqrt() * self.scale_factor)
        kl = torch.cat([posterior.kl().flatten(1).sum(1) for posterior, _ in found])
        figures = {"kl": float(kl.mean()), "scale_factor": float(self.scale_factor), "scaled_deviation": scaled}
        alarms = list(rank.alarms)
        if not 1 / OFF_SCALE < scaled < OFF_SCALE:
            alarms.append(
                f"the scaled latents' standard deviation is {scaled:.2f}, not 1: train for longer, lower optim.base_lr or, in Python, call "
                "fit_scale(batches)"
            )
        return Diagnosis(rank.figures | figures, alarms)

    def _posterior(self, tokens: Tensor) -> Gaussian:
        return gaussian(self.bottleneck.encode(tokens))

    def _count(self, z: Tensor) -> None:
        """Takes a batch of codes into the running moments: a plain mean at first, then an exponential one."""
        self.steps += 1
        batch = global_mean(torch.stack([z.mean(), z.square().mean()]))
        self.moments.lerp_(batch, (1 / self.steps).clamp(min=1 - DECAY))


def _moments(codes: Iterable[Tensor]) -> Tensor:
    """(2,) float64: the means of z and of z^2 over all codes."""
    total, count = torch.zeros(2, dtype=torch.float64), 0
    for z in codes:
        total += torch.stack([z.double().sum(), z.double().square().sum()]).cpu()
        count += z.numel()
    return total / count


def _channels(values: int, width: int, wanted: int | str) -> int:
    """The channels of a code whose place stands for a patch of so many values and is read from a token of this width."""
    channels = min(4, max(1, values // 4)) if wanted == "auto" else int(wanted)
    if not 0 < channels < values or channels > width:
        way_out = f"choose 1 to {min(values - 1, width)}" if values > 1 else "raise encoder.patch_size"
        facts = f"a patch has {values} values and the encoder is {width} wide"
        raise ConfigError(f"method.latent_channels {channels} is no bottleneck where {facts}: {way_out}")
    return channels
