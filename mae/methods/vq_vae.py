"""VQ-VAE: van den Oord et al., arXiv:1711.00937.

Every patch becomes the nearest of a few hundred codes, and the codes an image again:

    loss = mean (x - decode(e))^2 / var(x) + mean (sg[z] - e)^2 + commitment * mean (z - sg[e])^2

with z the encoder's latents, e the codes and sg the stop-gradient. The middle term is there for `codebook: gradient` alone; `ema` moves the
codes to the mean of their latents (appendix A.1), `fsq` rounds to a fixed grid and needs neither of the last two terms. Everything is a
mean, and the division by the data's variance makes the commitment weigh the same whatever the data. A prior over the codes, fitted
after training, makes images: section 3.3.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.methods import losses
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output
from mae.nets import keyed, prior, quantise, vit
from mae.nets.decoder import image_decoder
from mae.nets.encoders import Encoder
from mae.nets.snapshot import snapshot
from mae.nets.standardise import Standardise
from mae.nets.statistics import global_mean

CODEBOOKS = ("ema", "gradient", "fsq")
LEVELS = [8, 5, 5, 5]  # 1,000 codes: Mentzer et al., arXiv:2309.15505, table 1
VARIANCE_FLOOR = 1e-6  # what images that are all alike are divided by
COLLAPSED = 0.05  # of the codes in use, by perplexity: below it the codebook has collapsed


class VQVAE(Autoencoder):
    """One code for every patch of a ViT, every place of a convolutional encoder; latents are standardised before (not in the paper).

    The data's variance is that of the first training batch that has any, all ranks together, and is kept from then on. Raises ConfigError
    for settings that mean nothing.
    """

    batch_statistics = True  # codebook and variance follow whole batches
    quantiser: quantise.FSQ | quantise.Codebook
    prior_steps: Tensor
    variance: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        codebook: str = "ema",
        codebook_size: int | str = "auto",
        code_width: int = 64,
        commitment: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 0.05,
        levels: Sequence[int] = LEVELS,
        prior_depth: int = 4,
        prior_width: int | str = "auto",
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        if codebook not in CODEBOOKS:
            raise ConfigError(f"method.codebook {codebook} is unknown: choose one of {', '.join(CODEBOOKS)}")
        if codebook == "fsq":
            self.quantiser = quantise.FSQ(_levels(levels))
        else:
            size = min(512, 2 * encoder.embed_dim) if codebook_size == "auto" else int(codebook_size)
            learned = codebook == "gradient"
            self.writes_parameters = learned  # codes start over as latents
            self.quantiser = quantise.Codebook(size, code_width, decay=decay, restart_below=restart_below, learned=learned)
        self.commitment = commitment
        self.project = nn.Linear(encoder.embed_dim, self.quantiser.width)
        vit.initialise(self.project)
        self.standardise = Standardise(self.quantiser.width)
        self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=self.quantiser.width)
        self.prior = _prior(self.quantiser.size, encoder, prior_depth, prior_width)
        self.register_buffer("prior_steps", torch.zeros((), dtype=torch.int64))  # that it was fitted for
        self.register_buffer("variance", torch.zeros(()))  # of a pixel; 0 until the first training batch

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of images (B, C, H, W); the keys decide where k-means starts and what becomes of dead codes."""
        code = self.quantiser(self.standardise(self._projected(self.encoder.forward_features(images))), keys)
        error = losses.squared_error(self.decoder(code.vectors), images) / images[0].numel()
        loss = error / self._variance(images) + code.codebook_loss + self.commitment * code.commitment
        metrics = {
            "loss_per_pixel": error,
            "commitment": code.commitment,
            "perplexity": quantise.perplexity(code.shares),
            "codes_used": (code.shares > 0).float().mean(),
        }
        return Output(loss, {name: value.detach() for name, value in metrics.items()})

    def indices(self, images: Tensor) -> Tensor:
        """The code of every place of images (B, C, H, W): (B, N) int64."""
        return self._nearest(self.encoder.forward_features(images))

    def code(self, tokens: Tensor) -> Tensor:
        """The codes' vectors (B, N, code_width) of the encoder's tokens (B, P + N, D)."""
        return self.quantiser.vectors_of(self._nearest(tokens))

    def decode(self, latents: Tensor) -> Tensor:
        """Codes' vectors (B, N, code_width) -> images (B, C, H, W)."""
        return self.decoder(latents)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) from their codes."""
        return self.decode(self.latent(images))

    def no_weight_decay(self) -> set[str]:
        """A code that is not used for a while must not shrink."""
        return {"quantiser.vectors"}

    @torch.no_grad()
    def fit_prior(self, batches: Batches, *, steps: int = 2000, batch_size: int = 64, learning_rate: float = 1e-3, seed: int = 0) -> float:
        """Fits the prior that `sample` draws from to the codes of the training images; returns its -log p a code, in nats.

        The prior's weights are part of the model from the beginning, without gradient, so that training and checkpoints need not know
        of it; a fitted one is saved with the rest.
        """
        codes = torch.cat([self.indices(images) for images, _ in batches])
        nats = prior.fit(self.prior, codes, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
        self.prior_steps.fill_(steps)
        return nats

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Images (n, C, H, W) of codes drawn from the prior; image i is a function of (seed, i). ConfigError before `fit_prior`."""
        if not self.prior_steps:
            raise ConfigError("this VQ-VAE has no prior to sample from yet: call fit_prior(batches) with training images first")
        keys = torch.from_numpy(keyed.hash_integers(seed, torch.arange(n).numpy())).to(self.variance.device)
        return self.decode(self.quantiser.vectors_of(self.prior.sample(keys)))

    @torch.no_grad()
    def diagnose(self, batches: Batches) -> Diagnosis:
        """How many codes are in use, over all held-out images together: a single batch would show too few."""
        found = torch.cat([self.indices(images).flatten() for images, _ in batches])
        counts = torch.bincount(found, minlength=self.quantiser.size)
        perplexity, usage = float(quantise.perplexity(counts / counts.sum())), float((counts > 0).double().mean())
        alarms = []
        possible = min(self.quantiser.size, len(found))
        if perplexity < max(COLLAPSED * possible, 1.5):
            fixed = isinstance(self.quantiser, quantise.FSQ)
            remedy = " or choose smaller method.levels" if fixed else ", raise method.restart_below or set method.codebook=fsq"
            carry = f"of {self.quantiser.size} codes about {perplexity:.1f} carry all held-out images"
            alarms.append(f"index collapse: {carry}: lower optim.base_lr{remedy}")
        return Diagnosis({"perplexity": perplexity, "codebook_usage": usage, "codebook_size": float(self.quantiser.size)}, alarms)

    def _projected(self, tokens: Tensor) -> Tensor:
        """(B, P + N, D) -> (B, N, code_width), to be standardised and quantised."""
        return self.project(tokens[:, self.encoder.num_prefix_tokens :])

    def _nearest(self, tokens: Tensor) -> Tensor:
        return self.quantiser.indices(self.standardise.as_seen(self._projected(tokens)))

    @torch.no_grad()
    def _variance(self, images: Tensor) -> Tensor:
        moments = torch.stack([images.float().mean(), images.float().square().mean()])
        mean, square = global_mean(moments) if self.training else moments
        of_batch = square - mean**2
        known = torch.where(self.variance > 0, self.variance, of_batch.clamp(min=VARIANCE_FLOOR))
        if self.training:
            self.variance.copy_(torch.where(known > VARIANCE_FLOOR, known, 0.0))  # a batch without any variance is not kept
        return snapshot(known)


def _levels(levels: Sequence[int]) -> Sequence[int]:
    if not levels or any(not isinstance(level, int) for level in levels):
        raise ConfigError(f"method.levels {levels} must be whole numbers: try {LEVELS}")
    return levels


def _prior(codes: int, encoder: Encoder, depth: int, width: int | str) -> prior.Prior:
    width = min(256, encoder.embed_dim) if width == "auto" else int(width)
    heads = max(math.gcd(width, width // 32 or 1), 1)
    net = prior.Prior(codes=codes, places=encoder.patch_embed.num_patches, width=width, depth=depth, heads=heads)
    return net.requires_grad_(False)
