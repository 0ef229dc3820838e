"""Contractive autoencoder: Rifai et al., "Contractive Auto-Encoders: Explicit Invariance During Feature Extraction", ICML 2011.

The code f(image) shall hardly move when the image does, but for the moves that reconstruction needs:

    loss = mean over the batch of sum over pixels of (image - decode(f(image)))^2 + weight * |J_f(image)|_F^2

The squared norm of the Jacobian is estimated in float32, whatever the rest runs in: half precision would drown a difference of codes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mae.errors import ConfigError
from mae.methods import losses
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output, code_rank
from mae.nets import keyed
from mae.nets.bottleneck import Bottleneck
from mae.nets.conv import DenseEncoder
from mae.nets.decoder import image_decoder
from mae.nets.encoders import Encoder

PENALTIES = ("finite_difference", "hutchinson", "closed_form")


class Contractive(Autoencoder):
    """An autoencoder whose code is contractive; with encoder.name=dense the code is its sigmoid units, as in the paper.

    `finite_difference` needs no second derivative, costs one more encoding a probe and may be compiled; `hutchinson` differentiates
    twice (through explicit attention, which is slower; never compiled); both are unbiased but for the step's square. The default step
    errs by about 1%, through curvature and through the 10-bit mantissas of cuDNN's float32 convolutions alike. `closed_form` is exact.
    Raises ConfigError where closed_form does not apply and for codes that are none.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        weight: float = 0.1,
        penalty: str = "finite_difference",
        step: float = 0.01,
        probes: int = 1,
        bottleneck: str = "global",
        bottleneck_size: int | str = "auto",
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        units = isinstance(encoder, DenseEncoder) and isinstance(encoder.norm, nn.Sigmoid)
        if penalty not in PENALTIES:
            raise ConfigError(f"method.penalty {penalty} is unknown: choose one of {', '.join(PENALTIES)}")
        if penalty == "closed_form" and not units:
            raise ConfigError("method.penalty closed_form is for one sigmoid layer: set encoder.name=dense or penalty=finite_difference")
        if units and bottleneck_size not in ("auto", encoder.embed_dim):
            raise ConfigError(f"with encoder.name=dense the {encoder.embed_dim} units are the code: leave method.bottleneck_size at auto")
        self.weight, self.penalty, self.step, self.probes = weight, penalty, step, probes
        self.differentiates = penalty == "hutchinson"
        size = 32 if bottleneck_size == "auto" else int(bottleneck_size)
        self.bottleneck = Units() if units else Bottleneck(encoder, kind=bottleneck, size=size, width=encoder.embed_dim)
        self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=encoder.embed_dim)

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of images (B, C, H, W); the keys draw the directions in which the Jacobian is probed."""
        code, squared = self._contraction(images, keys)
        reconstruction = losses.squared_error(self.decode(code), images)
        loss = reconstruction + self.weight * squared.mean()
        metrics = {"loss_per_pixel": reconstruction / images[0].numel(), **_norms(images, code, squared)}
        return Output(loss, {name: value.detach() for name, value in metrics.items()})

    def code(self, tokens: Tensor) -> Tensor:
        """The code (B, bottleneck_size), (B, N, bottleneck_size) or (B, units) of the encoder's tokens (B, P + N, D)."""
        return self.bottleneck.encode(tokens)

    def decode(self, latents: Tensor) -> Tensor:
        """Codes -> images (B, C, H, W)."""
        return self.decoder(self.bottleneck.decode(latents))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) after the passage through the code."""
        return self.decode(self.latent(images))

    def _contraction(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The code of images and the estimate of its squared Jacobian norm (B,), in float32 at least."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.float() if images.itemsize < 4 else images
            if self.penalty == "closed_form":
                return sigmoid_layer(self.latent(images), self.encoder.patch_embed.proj.weight)
            if self.penalty == "hutchinson":
                return hutchinson(self.latent, images, keys, probes=self.probes)
            return finite_difference(self.latent, images, keys, step=self.step, probes=self.probes)

    @torch.no_grad()
    def diagnose(self, batches: Batches) -> Diagnosis:
        """The code's rank, the norm of its Jacobian and of the decoder's on held-out images, and how far codes lie apart."""
        codes, encoding, decoding, norms = [], [], [], []
        for images, keys in batches:
            code, squared = self._contraction(images, keys)
            moved = finite_difference(self.decode, code, keys, step=self.step * float(code.square().mean().sqrt()) + 1e-12, probes=1)[1]
            codes.append(code)
            encoding.append(squared)
            decoding.append(moved)
            norms.append(images.float().square().flatten(1).sum(1))
        code = torch.cat(codes)
        rank = code_rank(codes)
        encoder, decoder, size_of_images = (torch.cat(x).double().mean().sqrt() for x in (encoding, decoding, norms))
        size = code.double().square().flatten(1).sum(1).mean().sqrt()
        spread = code.double().flatten(1).var(0, correction=0).sum().sqrt()
        figures = {
            "jacobian_norm": float(encoder),
            "jacobian_ratio": float(encoder * size_of_images / size.clamp(min=1e-30)),
            "code_spread": float(spread / size.clamp(min=1e-30)),
            "decoder_expansion": float(decoder / encoder.clamp(min=1e-30)),
        }
        return Diagnosis(rank.figures | figures, rank.alarms + _alarms(rank.figures | figures, images[0].numel()))


class Units(nn.Module):
    """In place of a bottleneck: the encoder's one token is the code."""

    def encode(self, tokens: Tensor) -> Tensor:
        """(B, 1, D) -> (B, D)"""
        return tokens.flatten(1)

    def decode(self, code: Tensor) -> Tensor:
        """(B, D) -> (B, 1, D)"""
        return code[:, None]


def finite_difference(function: Callable[[Tensor], Tensor], x: Tensor, keys: Tensor, *, step: float, probes: int) -> tuple[Tensor, Tensor]:
    """function(x) and E |function(x + step * v) - function(x)|^2 / step^2 = |J|_F^2 + O(step^2), (B,), over random signs v.

    Terms odd in v have mean zero, so that the one-sided difference errs no more than a central one of twice the cost.
    """
    moved = x + step * _signs(keys, x, probes)  # (probes, B, ...)
    values = function(torch.cat([x[None], moved]).flatten(0, 1)).unflatten(0, (1 + probes, len(x)))
    return values[0], ((values[1:] - values[0]) / step).flatten(2).square().sum(2).mean(0)


@torch.compiler.disable  # compiled graphs have no second derivative
def hutchinson(function: Callable[[Tensor], Tensor], x: Tensor, keys: Tensor, *, probes: int) -> tuple[Tensor, Tensor]:
    """function(x) and E |v' J|^2 = |J|_F^2, (B,), over random signs v: Hutchinson, Comm. Stat. 18 (1989), differentiable once more."""
    training = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        x = x.detach().requires_grad_()
        value = function(x)
        pulled = [torch.autograd.grad(value, x, v, create_graph=training, retain_graph=True)[0] for v in _signs(keys, value, probes)]
    squared = torch.stack(pulled).flatten(2).square().sum(2).mean(0)
    return (value, squared) if training else (value.detach(), squared)


def sigmoid_layer(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """h = sigmoid(W x + b), (B, units), and |J|_F^2 = sum_j (h_j (1 - h_j))^2 |W_j|^2, (B,), exactly: the paper's equation 7."""
    return h, (h * (1 - h)).square() @ weight.flatten(1).square().sum(1)


def _signs(keys: Tensor, like: Tensor, probes: int) -> Tensor:
    """(probes, B, ...) of random signs, decided by the keys (B,), for a tensor (B, ...)."""
    draws = keyed.uniform(keys, probes * like[0].numel(), "noise").view(len(keys), probes, *like.shape[1:]).transpose(0, 1)
    return torch.where(draws < 0.5, -1.0, 1.0).to(like.dtype)


def _norms(images: Tensor, code: Tensor, squared: Tensor) -> dict[str, Tensor]:
    """|J|_F and |J|_F |x| / |h|, each norm the root of its mean square over the batch."""
    norm, x, h = (v.mean().sqrt() for v in (squared, images.float().flatten(1).square().sum(1), code.float().flatten(1).square().sum(1)))
    return {"jacobian_norm": norm, "jacobian_ratio": norm * x / h.clamp(min=1e-30)}


def _alarms(figures: dict[str, float], values: int) -> list[str]:
    """What is wrong with a code of images of so many values.

    A code that follows the image linearly has a ratio of at least 1. To images of unit variance a code of unit variance is expanded by
    about values / code_size; its scale is free, and shrinking it is the penalty's cheap way out.
    """
    alarms = []
    if figures["jacobian_ratio"] < 0.5 and figures["code_spread"] < 0.1:
        alarms.append(
            f"the code hardly depends on the image, its Jacobian ratio is {figures['jacobian_ratio']:.2f} and its spread "
            f"{100 * figures['code_spread']:.0f}% of its size: lower method.weight"
        )
    elif figures["decoder_expansion"] > 20 * max(values / figures["code_size"], 1):
        alarms.append(
            f"the code has shrunk instead of becoming contractive, the decoder expands {figures['decoder_expansion']:.0f} times what the "
            "encoder shrinks: lower method.weight"
        )
    return alarms
