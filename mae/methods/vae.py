"""Variational autoencoder: Kingma & Welling, arXiv:1312.6114.

The code of an image is a Gaussian q(z|x); a sample of it is decoded, and q is kept near the prior N(0, 1):

    loss = -E_q log p(x|z) + beta * KL(q(z|x) || N(0, 1))        in nats: the negative evidence bound at beta = 1

`loss: calibrated` is the sigma-VAE (Rybkin et al., arXiv:2006.13202, equation 9): a Gaussian decoder whose one variance is the optimal
one, the mean squared error itself, so that -log p = D/2 (log 2 pi MSE + 1) and beta needs no tuning. The capacity form is that of
Burgess et al., arXiv:1804.03599, equation 8: capacity_weight * |KL - C| with C rising from 0.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.methods import losses
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output
from mae.nets import keyed, vit
from mae.nets.bottleneck import Bottleneck
from mae.nets.decoder import image_decoder
from mae.nets.encoders import Encoder
from mae.nets.gaussian import LOG_TWO_PI, Gaussian, gaussian, log_normal
from mae.nets.snapshot import snapshot
from mae.nets.statistics import global_mean

LOSSES = ("calibrated", "gaussian", "bce")
VARIANCE_FLOOR = 1e-6  # a decoder that reproduces its images exactly would have an infinite density
VARIANCE_DECAY = 0.99  # of the average over training steps that evaluation uses
ACTIVE = 0.01  # variance over images of a latent's mean from which it counts as active: Burda et al., arXiv:1509.00519
COLLAPSED, LITTLE = 0.05, 1.0  # share of the latents that is active, nats an image: below either the posterior has collapsed


class VAE(Autoencoder):
    """One Gaussian code of `bottleneck_size` numbers an image; its features are the posterior mean.

    `loss: gaussian` has the fixed `variance` a pixel, `bce` takes pixels in [0, 1] as probabilities. `free_bits` is the least that a
    dimension's batch-mean KL counts as; beta rises linearly over the first `warmup_steps`, without which an untrained decoder learns to
    pass over the code. `capacity` takes beta's place. In training the calibrated variance is that of the global batch, in evaluation a
    running average of these. Raises ConfigError for an unknown loss and for settings that exclude each other.
    """

    batch_statistics = True
    variance: Tensor
    steps: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        bottleneck_size: int = 32,
        beta: float = 1.0,
        loss: str = "calibrated",
        variance: float = 1.0,
        free_bits: float = 0.0,
        warmup_steps: int = 200,
        capacity: float = 0.0,
        capacity_steps: int = 100_000,
        capacity_weight: float = 1000.0,
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        if loss not in LOSSES:
            raise ConfigError(f"method.loss {loss} is unknown: choose one of {', '.join(LOSSES)}")
        if capacity and free_bits:
            raise ConfigError("method.capacity and method.free_bits both hold the KL up: set one of them to 0")
        self.beta, self.loss, self.free_bits, self.warmup_steps = beta, loss, free_bits, warmup_steps
        self.capacity, self.capacity_steps, self.capacity_weight = capacity, capacity_steps, capacity_weight
        self.bottleneck = Bottleneck(encoder, kind="global", size=bottleneck_size, width=encoder.embed_dim, moments=2)
        self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=encoder.embed_dim)
        self.pixels = encoder.patch_embed.num_patches * vit.patch_values(encoder)
        self.register_buffer("variance", torch.tensor(1.0 if loss == "calibrated" else float(variance)))  # of p(x|z), a pixel
        self.register_buffer("steps", torch.zeros(()))  # training steps taken

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of images (B, C, H, W), in nats an image; the keys decide the posterior's noise."""
        posterior = self.posterior(images)
        error = self._error(self._decode(posterior.sample(keys)), images)
        kl = self._batch_mean(posterior.kl().mean(0))  # (k,)
        loss = self._distortion(error) + self._penalty(kl)
        metrics = {"loss_per_pixel": loss / self.pixels, "error_per_pixel": error, "kl": kl.sum(), "kl_per_dimension": kl.mean()}
        if self.training:
            self.steps += 1
        return Output(loss, {name: value.detach() for name, value in metrics.items()})

    def posterior(self, images: Tensor) -> Gaussian:
        """q(z|x) of images (B, C, H, W), k numbers each."""
        return self._posterior(self.encoder.forward_features(images))

    def code(self, tokens: Tensor) -> Tensor:
        """The posterior mean (B, k) of the encoder's tokens (B, P + N, D)."""
        return self._posterior(tokens).mean

    def decode(self, latents: Tensor) -> Tensor:
        """Codes (B, k) -> images (B, C, H, W), the mean of p(x|z)."""
        made = self._decode(latents)
        return made.sigmoid() if self.loss == "bce" else made

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) from their posterior mean."""
        return self.decode(self.latent(images))

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Images (n, C, H, W) decoded from the prior; image i is a function of (seed, i)."""
        keys = torch.from_numpy(keyed.hash_integers(seed, np.arange(n))).to(self.steps.device)
        return self.decode(keyed.normal(keys, self.bottleneck.size, "latent"))

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 8) -> Tensor:
        """From images a to images b (B, C, H, W) along the straight line between their codes: (B, steps, C, H, W), both ends included."""
        start, end = self.latent(a)[:, None], self.latent(b)[:, None]
        share = torch.linspace(0, 1, steps, device=start.device)[None, :, None]
        return self.decode(torch.lerp(start, end, share).flatten(0, 1)).unflatten(0, (len(a), steps))

    @torch.no_grad()
    def iwae_bound(self, images: Tensor, keys: Tensor, *, samples: int = 50, chunk: int = 16) -> Tensor:
        """A lower bound of log p(x) (B,), in nats of the normalised pixels, tighter with more samples: Burda et al., arXiv:1509.00519.

        log 1/K sum_i p(x|z_i) p(z_i) / q(z_i|x) with K = `samples`, of which `chunk` are decoded at a time. Sample i depends on the key
        and on i alone.
        """
        posterior = self.posterior(images)
        draws = keyed.bits(keys, samples, "draw")  # (B, K), a key for every sample
        weights = []
        for some in draws.split(chunk, dim=1):
            repeated = Gaussian(*(x.repeat_interleave(some.shape[1], 0) for x in posterior))
            z = repeated.sample(some.flatten())
            likelihood = self._log_likelihood(self._decode(z), images.repeat_interleave(some.shape[1], 0))
            prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)
            weights.append((likelihood + prior - repeated.log_density(z)).view(some.shape))
        return torch.cat(weights, dim=1).logsumexp(1) - math.log(samples)

    @torch.no_grad()
    def diagnose(self, batches: Batches) -> Diagnosis:
        """Which latents are used on held-out images, and how far the aggregate posterior is from the prior."""
        found = [self.posterior(images) for images, _ in batches]
        posterior = Gaussian(*(torch.cat(parts).double() for parts in zip(*found, strict=True)))
        kl = posterior.kl().mean(0)
        k = len(kl)
        active = int((posterior.mean.var(0, correction=0) > ACTIVE).sum())
        covariance = posterior.mean.T.cov(correction=0).view(k, k) + posterior.log_variance.exp().mean(0).diag()
        figures = {
            "kl": float(kl.sum()),
            "kl_per_dimension/mean": float(kl.mean()),
            "kl_per_dimension/most": float(kl.max()),
            "kl_per_dimension/least": float(kl.min()),
            "active_units": float(active),
            "active_share": active / k,
            # both 0 where the codes of the images together fill the prior, and per dimension
            "aggregate_mean_distance": float(posterior.mean.mean(0).norm()) / k**0.5,
            "aggregate_covariance_distance": float((covariance - torch.eye(k).to(covariance)).norm()) / k**0.5,
            "beta_norm": self.beta * k / self.pixels,
        }
        alarms = []
        if (active < max(1, COLLAPSED * k) or figures["kl"] < LITTLE) and len(posterior.mean) > 1:
            alarms.append(
                f"posterior collapse: {active or 'none'} of the {k} latents depend{'s' * (active < 2)} on the image "
                f"(KL {figures['kl']:.2f} nats), so that "
                "reconstructions are nearly the same: lower method.beta, or set method.free_bits=0.1 or method.warmup_steps"
            )
        return Diagnosis(figures, alarms)

    def _posterior(self, tokens: Tensor) -> Gaussian:
        return gaussian(self.bottleneck.encode(tokens))

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.bottleneck.decode(z))

    def _error(self, made: Tensor, images: Tensor) -> Tensor:
        """The batch's error a pixel: squared, or the cross-entropy in nats for bce."""
        total = losses.binary_cross_entropy(made, images) if self.loss == "bce" else losses.squared_error(made, images)
        return total / self.pixels

    def _distortion(self, error: Tensor) -> Tensor:
        """-log p(x|z) in nats an image, from the error a pixel."""
        if self.loss == "bce":
            return self.pixels * error
        if self.loss == "gaussian" or not self.training:
            return 0.5 * self.pixels * (error / self.variance + self.variance.log() + LOG_TWO_PI)
        variance = self._batch_mean(error) + VARIANCE_FLOOR
        rate = (1 / (self.steps + 1)).clamp(min=1 - VARIANCE_DECAY)  # a plain mean over the first steps
        self.variance.lerp_(variance.detach(), rate)
        return 0.5 * self.pixels * (variance.log() + LOG_TWO_PI + 1)

    def _penalty(self, kl: Tensor) -> Tensor:
        """What the KL (k,) of the dimensions, means over the batch, adds to the loss."""
        steps = snapshot(self.steps)
        if self.capacity:
            allowed = self.capacity * (steps / self.capacity_steps).clamp(max=1)
            return self.capacity_weight * (kl.sum() - allowed).abs()
        beta = self.beta * ((steps + 1) / self.warmup_steps).clamp(max=1) if self.warmup_steps else self.beta
        return beta * kl.clamp(min=self.free_bits).sum()

    def _batch_mean(self, mean: Tensor) -> Tensor:
        """The mean over the global batch; evaluation happens on one rank alone, which has all of its batch."""
        return global_mean(mean) if self.training else mean

    def _log_likelihood(self, made: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) (B,) in nats."""
        if self.loss == "bce":
            each = -F.binary_cross_entropy_with_logits(made.float(), images.float(), reduction="none")
        else:
            each = log_normal(images.float(), made.float(), self.variance.log())
        return each.flatten(1).sum(1)
