"""Sparse autoencoder: a token as a sum of few of many atoms.

    loss = sum (target - decode(dictionary(code)))^2 + the price of the code        (sums over an image, mean over the batch)

`topk` keeps the k largest activations and lets units that are dead explain what is missing: Gao et al., arXiv:2406.04093, sections 2.3
and A.2. `l1` charges for sum |code|. `kl` keeps the mean activation of every unit near rho: Ng's CS294A notes (2011). A mean near rho is a
sparse code only where a unit is nearly on or off, which is why `kl` starts with long rows. Atoms have unit norm, since the code would
otherwise shrink and its atoms grow.

Around an encoder that learns, the target is the image. Around a frozen one it is the encoder's own tokens, standardised: then the atoms
say what the encoder has learnt.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.methods import losses
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output
from mae.nets import vit
from mae.nets.decoder import image_decoder
from mae.nets.dictionary import Dictionary, largest
from mae.nets.encoders import Encoder
from mae.nets.snapshot import snapshot
from mae.nets.standardise import Standardise
from mae.nets.statistics import global_mean, ranks

KINDS = ("topk", "l1", "kl")
GAIN = 4.0  # kl: length of the rows at the start; at 1 all activations stay near rho, and the decoder reads their small differences
LOGISTIC = 2.9  # variance of the normal distribution nearest to the logistic one: E sigmoid(a + b N(0, 1)) = Phi(a / (b^2 + 2.9)^0.5)


class TopImages(NamedTuple):
    """For each of some atoms the images that activate it most, the most activating first."""

    atoms: Tensor  # (A,) int64, the atom with the largest total activation first
    images: Tensor  # (A, count, C, H, W)
    places: Tensor  # (A, count) int64: the patch that activates it most
    activations: Tensor  # (A, count)


class Sparse(Autoencoder):
    """`expansion` * width units on the encoder's tokens. The encoder must be frozen (no parameter requires a gradient) before the method
    is made, where its tokens shall be the target.

    With `l1` on images the decoder after the dictionary could take up the code's scale: the rows that read the code then have unit norm
    too, and only a threshold makes the code small. Raises ConfigError for more active units than there are.
    """

    batch_statistics = True  # tokens are standardised over the batch, and rho is compared with its mean
    silent: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        kind: str = "topk",
        expansion: int | str = "auto",
        k: int | str = "auto",
        k_aux: int | str = "auto",
        aux_weight: float = 0.03125,
        dead_after: int | str = "auto",
        l1: float | str = "auto",
        rho: float = 0.05,
        beta: float = 3.0,
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        if kind not in KINDS:
            raise ConfigError(f"method.kind {kind} is unknown: choose one of {', '.join(KINDS)}")
        width = encoder.embed_dim
        self.of_tokens = not any(p.requires_grad for p in encoder.parameters())
        # an encoder that learns serves few atoms and leaves the rest dead: on digits 65% of 8 times its width, 21% of twice its width
        units = _whole("expansion", expansion, 8 if self.of_tokens else 2) * width
        self.kind, self.aux_weight, self.rho, self.beta = kind, aux_weight, rho, beta
        self.k = _whole("k", k, max(4, width // 24))  # the paper's 32 of GPT-2's 768
        self.k_aux = _whole("k_aux", k_aux, min(256, width // 2))
        self.dead_after = _whole("dead_after", dead_after, 10_000_000 if width >= 768 else 100_000)
        # on digits ten times this price leaves 82% of the units dead after 300 steps, 94% after 1,100; this one a third, then 82%
        self.l1 = (1.0 if self.of_tokens else 0.1 * vit.patch_values(encoder) / width) if l1 == "auto" else float(l1)
        _check(units, self.k, self.k_aux)
        self.active_above = 0.5 if kind == "kl" else 0.0  # from which activation on a unit counts as active

        self.standardise = Standardise(width)
        self.dictionary = Dictionary(units, width, unit_rows=kind == "l1" and not self.of_tokens)
        if kind == "kl":
            _start_at(rho, self.dictionary)
        if not self.of_tokens:
            self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=width)
        self.register_buffer("silent", torch.zeros(units, dtype=torch.int64))  # training tokens since each unit was last active

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of images (B, C, H, W); nothing is random."""
        tokens = self.standardise(self._patches(self.encoder.forward_features(images)))
        target = tokens if self.of_tokens else images
        drive = self.dictionary.read(tokens)  # (B, N, units)
        code = self._activate(drive)
        rebuilt = self.dictionary(code)
        error = losses.squared_error(self._decode(rebuilt), target)
        loss = error + self._price(code)
        if self.kind == "topk" and self.aux_weight:
            dead = snapshot(self.silent >= self.dead_after)
            helped = rebuilt.detach() + self.dictionary.spread(largest(drive.relu() * dead, self.k_aux))
            loss = loss + self.aux_weight * dead.any() * losses.squared_error(self._decode(helped), target)
        active = code.detach() > self.active_above
        if self.training:
            self._count(active)
        metrics = {
            "loss_per_feature" if self.of_tokens else "loss_per_pixel": error.detach() / target[0].numel(),
            "l0": active.sum(-1).float().mean(),
            "dead_share": (self.silent >= self.dead_after).float().mean(),
        }
        return Output(loss, metrics)

    def code(self, tokens: Tensor) -> Tensor:
        """The code (B, N, units) of every patch's token, of the encoder's (B, P + N, D)."""
        return self._code(self.standardise.as_seen(self._patches(tokens)))

    # properties, so that evaluators, which ask by name, find them only where images are decoded
    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """Codes (B, N, units) -> images (B, C, H, W)."""
        if self.of_tokens:
            raise AttributeError("a dictionary on a frozen encoder's tokens makes no images")
        return lambda latents: self._decode(self.dictionary(latents))

    @property
    def reconstruct(self) -> Callable[[Tensor], Tensor]:
        """Images (B, C, H, W) from their codes."""
        decode = self.decode
        return lambda images: decode(self.latent(images))

    def no_weight_decay(self) -> set[str]:
        """What has unit norm: decay would only shorten what is divided by its length anyway."""
        return {"dictionary.atoms", "dictionary.rows"} if self.dictionary.unit_rows else {"dictionary.atoms"}

    @torch.no_grad()
    def diagnose(self, batches: Batches) -> Diagnosis:
        """How sparse the code of held-out images is, how many units it uses, and what share of the target's variance it explains."""
        units = self.dictionary.units
        seen, tokens_seen, l0, hoyer = torch.zeros(units, dtype=torch.bool), 0, 0.0, 0.0
        images_seen, error, total, square = 0, 0.0, torch.zeros(()), 0.0
        for images, _ in batches:
            tokens = self.standardise.as_seen(self._patches(self.encoder.forward_features(images)))
            code = self._code(tokens)
            target = (tokens if self.of_tokens else images).flatten(1).double()
            made = self._decode(self.dictionary(code)).flatten(1).double()
            error += float((target - made).square().sum())
            total, square = total + target.sum(0), square + float(target.square().sum())
            active = code > self.active_above
            seen = seen.to(active.device) | active.flatten(0, 1).any(0)
            l0, hoyer = l0 + float(active.sum()), hoyer + float(_hoyer(code).sum())
            images_seen, tokens_seen = images_seen + len(images), tokens_seen + code.shape[0] * code.shape[1]
        explained = 1 - error / max(square - float((total.square() / images_seen).sum()), 1e-30)
        figures = {"l0": l0 / tokens_seen, "dead_share": float((~seen).double().mean()), "r2": explained, "hoyer": hoyer / tokens_seen}
        return Diagnosis(figures, self._alarms(figures))

    @torch.no_grad()
    def top_images(self, batches: Batches, atoms: int, count: int) -> TopImages:
        """What the `atoms` most active atoms stand for: the `count` images that activate each most.

        Holds the batches' images in memory. Raises ConfigError for more atoms or images than there are.
        """
        kept = [images for images, _ in batches]
        strongest, places, totals = [], [], torch.zeros(())
        for images in kept:
            code = self.latent(images)
            activation, place = code.max(1)  # (B, units)
            strongest.append(activation)
            places.append(place)
            totals = totals + code.sum((0, 1))
        images, activation, place = torch.cat(kept), torch.cat(strongest), torch.cat(places)
        if not 0 < atoms <= self.dictionary.units or not 0 < count <= len(images):
            limits = f"1 to {self.dictionary.units} atoms and 1 to {len(images)} images"
            raise ConfigError(f"{atoms} atoms with {count} images each are not there: ask for {limits}")
        chosen = totals.topk(atoms).indices
        values, ids = activation[:, chosen].T.topk(count, dim=1)  # (A, count)
        return TopImages(chosen, images[ids], place[:, chosen].T.gather(1, ids), values)

    def _patches(self, tokens: Tensor) -> Tensor:
        """(B, P + N, D) -> (B, N, D), to be standardised."""
        return tokens[:, self.encoder.num_prefix_tokens :]

    def _code(self, tokens: Tensor) -> Tensor:
        return self._activate(self.dictionary.read(tokens))

    def _activate(self, drive: Tensor) -> Tensor:
        if self.kind == "topk":
            return largest(drive, self.k)
        return drive.relu() if self.kind == "l1" else drive.sigmoid()

    def _decode(self, rebuilt: Tensor) -> Tensor:
        """The dictionary's tokens (B, N, D) -> what is compared with the target."""
        return rebuilt if self.of_tokens else self.decoder(rebuilt)

    def _price(self, code: Tensor) -> Tensor | float:
        """What the code (B, N, units) adds to the loss of an image."""
        if self.kind == "topk":
            return 0.0
        if self.kind == "l1":
            return self.l1 * code.sum((1, 2)).mean()
        mean = code.mean((0, 1))
        mean = (global_mean(mean) if self.training else mean).clamp(1e-6, 1 - 1e-6)  # inside a logarithm: of the global batch
        return self.beta * code.shape[1] * divergence(self.rho, mean).sum()

    @torch.no_grad()
    def _count(self, active: Tensor) -> None:
        somewhere = global_mean(active.flatten(0, 1).any(0).float()) > 0
        self.silent.copy_(torch.where(somewhere, 0, self.silent + ranks() * active.shape[0] * active.shape[1]))

    def _alarms(self, figures: dict[str, float]) -> list[str]:
        units, alarms = self.dictionary.units, []
        weaker = {"topk": "raise method.k", "l1": "lower method.l1", "kl": "raise method.rho"}[self.kind]
        stronger = {"topk": "lower method.k", "l1": "raise method.l1", "kl": "raise optim.weight_decay or set method.kind=topk"}[self.kind]
        if figures["hoyer"] < 0.5:
            near = "every unit stays near method.rho, and the decoder reads small differences; " if self.kind == "kl" else ""
            alarms.append(f"the code is not sparse: Hoyer's measure is {figures['hoyer']:.2f} of 1; {near}{stronger}")
        if figures["dead_share"] > 0.5:
            remedy = "lower method.dead_after or method.expansion" if self.kind == "topk" else f"{weaker} or lower method.expansion"
            alarms.append(f"{100 * figures['dead_share']:.0f}% of the {units} units are dead: no held-out token activates them; {remedy}")
        if figures["r2"] < 0.05:
            share = 100 * figures["r2"]
            alarms.append(f"the code explains {share:.0f}% of the variance on held-out images: {weaker}, or change optim.base_lr")
        return alarms


@torch.no_grad()
def _start_at(rho: float, dictionary: Dictionary) -> None:
    """Long rows, and a threshold with which a unit's mean activation by standardised tokens is rho."""
    dictionary.rows.mul_(GAIN)
    dictionary.threshold.fill_(NormalDist().inv_cdf(rho) * (GAIN**2 + LOGISTIC) ** 0.5)


def divergence(rho: float, mean: Tensor) -> Tensor:
    """KL of a coin with probability rho from coins with probabilities `mean`, in nats: the same shape."""
    return rho * (rho / mean).log() + (1 - rho) * ((1 - rho) / (1 - mean)).log()


def _hoyer(code: Tensor) -> Tensor:
    """Hoyer's sparseness of codes (..., n): 0 where all numbers are equal, 1 where one alone is not zero. JMLR 5 (2004), section 3.1."""
    root = code.shape[-1] ** 0.5
    ratio = code.abs().sum(-1) / code.norm(dim=-1).clamp(min=1e-30)
    return ((root - ratio) / (root - 1)).clamp(max=1)


def _whole(name: str, value: int | str, auto: int) -> int:
    """What a setting of whole numbers means."""
    if value == "auto":
        return auto
    if isinstance(value, str) or value != int(value):
        raise ConfigError(f"method.{name} {value} is no whole number: try auto")
    return int(value)


def _check(units: int, k: int, k_aux: int) -> None:
    if units < 2:
        raise ConfigError(f"method.expansion makes {units} units of the encoder's width: choose more, say method.expansion=8")
    for name, value in (("k", k), ("k_aux", k_aux)):
        if not 0 < value <= units:
            raise ConfigError(f"method.{name} {value} must be from 1 to the {units} units: lower it or raise method.expansion")
