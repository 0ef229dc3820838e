"""What every method is: an encoder plus its own idea. The loop and the evaluators know only this."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mae.nets import vit
from mae.nets.encoders import Encoder

FLAT = 4096  # numbers of a code that evaluators take whole
Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, C, H, W), normalised, and their keys (B,)


class Output(NamedTuple):
    """What a training step needs of a forward pass."""

    loss: Tensor  # scalar, differentiable
    metrics: dict[str, Tensor]  # detached scalars to log


class Diagnosis(NamedTuple):
    """How a method is doing inside, on held-out images."""

    figures: dict[str, float]
    alarms: list[str]  # one sentence each: what is wrong, and what to change


class Reconstruction(NamedTuple):
    """What was hidden of images and what a decoder made of it."""

    prediction: Tensor  # (B, N, p * q * C) for every patch, in the target's units
    hidden: Tensor  # (B, N) bool, True = hidden from the encoder


class Sample(Protocol):
    """Images (n, C, H, W) from a prior; image i is a function of (seed, i)."""

    def __call__(self, n: int, seed: int = 0) -> Tensor: ...


class Autoencoder(nn.Module):
    """An encoder that learns by reconstruction. A method extends this once and composes nets.

    What is declared below without a value is optional: found by name, with hasattr, where a method defines it.
    """

    learns = True  # False: nothing is left to gradients, the training loop is not run
    batch_statistics = False  # True: the loss is no mean of its samples' losses, so that accumulation would change it
    writes_parameters = False  # True: its forward pass does, so that they must be whole wherever it runs
    separable = (
        False  # True: loss and figures are means over samples, and the forward pass leaves nothing behind: threads may share a batch
    )
    differentiates = False  # True: its forward pass differentiates itself, through whole parameters and activations that are kept

    code: Callable[[Tensor], Tensor]  # the encoder's tokens (B, P + N, D), P before the patches' -> the code (B, k) or (B, N, k)
    predict: Callable[..., Reconstruction]  # images, and keys or noise, where patches are hidden
    target: Callable[[Tensor], Tensor]  # patches (..., p * q * C) -> what is predicted of them
    hidden_count: int  # of an image's patches
    predicted_count: int  # of the hidden ones, in training
    sample: Sample  # images from the prior
    diagnose: Callable[[Batches], Diagnosis]
    fit: Callable[[Batches], None]  # of a method with a closed form
    if TYPE_CHECKING:  # some methods have these at times only

        @property
        def decode(self) -> Callable[[Tensor], Tensor]:
            """Codes -> images."""

        @property
        def reconstruct(self) -> Callable[..., Tensor]:
            """Images -> images; where patches are hidden, `keys` or `noise` say which."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of a batch: images (B, C, H, W) normalised; keys (B,) int64, one a sample, decide all randomness."""
        raise NotImplementedError(f"{type(self).__name__} has no loss: it learns nothing by gradients")

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """Deterministic features (B, D) of images (B, C, H, W), nothing hidden.

        `pool`: 'mean' over the patch tokens, 'cls' the class token (ConfigError without one), 'latent' the method's code: where
        each patch has one, all of them in a row, or their mean where that would be more than FLAT numbers (the mean over tokens where
        the method has no code).
        """
        return self.pooled(self.encoder.forward_features(images), pool)

    def pooled(self, tokens: Tensor, pool: str) -> Tensor:
        """The features (B, D) that `encode` makes, of the encoder's tokens (B, P + N, D)."""
        if pool == "latent" and hasattr(self, "code"):
            code = self.code(tokens)
            return code.flatten(1) if code[0].numel() <= FLAT else code.mean(1)
        return vit.pool(self.encoder, tokens, "mean" if pool == "latent" else pool)

    def latent(self, images: Tensor) -> Tensor:
        """The code (B, k) or (B, N, k) of images (B, C, H, W), by a method that has one."""
        return self.code(self.encoder.forward_features(images))

    def feature_maps(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Patch features of chosen blocks (default: the last) for dense tasks: a list of (B, D, h, w)."""
        return vit.feature_maps(self.encoder, images, layers)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed (timm's convention); vectors are exempt anyway."""
        return set()


def effective_rank(x: Tensor) -> float:
    """How many dimensions vectors (N, D) fill: exp of the entropy of their covariance's spectrum (Roy & Vetterli, EUSIPCO 2007)."""
    return entropy_rank(covariance_spectrum(x))


def covariance_spectrum(x: Tensor) -> Tensor:
    """The eigenvalues of the covariance of vectors (N, D), in float64, smallest first: (min(N, D),), the others are zero."""
    x = x.detach().double()
    x = x - x.mean(0)
    products = x.T @ x if x.shape[1] <= len(x) else x @ x.T  # the same eigenvalues
    return torch.linalg.eigvalsh(products / max(len(x) - 1, 1)).clamp(min=0)


def entropy_rank(spectrum: Tensor) -> float:
    """exp(entropy) of what each of some numbers (D,), none negative, is of their sum: D where all are equal; 0 where all are zero."""
    if spectrum.sum() < 1e-12 * max(len(spectrum), 1):
        return 0.0
    share = spectrum / spectrum.sum()
    return float((-(share * share.clamp(min=1e-30).log()).sum()).exp())


def code_rank(codes: Iterable[Tensor]) -> Diagnosis:
    """The effective rank of codes (B, k) or (B, N, k), with an alarm where they have collapsed."""
    x = torch.cat([code.detach().flatten(0, -2) for code in codes])
    rank = effective_rank(x)
    alarms = []
    if rank < 1.5 and x.shape[1] > 1:
        alarms.append(f"the code has collapsed to {rank:.1f} of its {x.shape[1]} dimensions: lower optim.base_lr or train for longer")
    return Diagnosis({"code_rank": rank, "code_size": float(x.shape[1])}, alarms)
