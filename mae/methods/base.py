"""What every method is: an encoder plus its own idea. The loop and the evaluators know only this."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.nets import vit


class Output(NamedTuple):
    """What a training step needs of a forward pass."""

    loss: Tensor  # scalar, differentiable
    metrics: dict[str, Tensor]  # detached scalars to log


class Autoencoder(nn.Module):
    """An encoder that learns by reconstruction. A method extends this once and composes nets."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    @abstractmethod
    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of a batch: images (B, C, H, W) normalised; keys (B,) int64, one a sample, decide all randomness."""

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """Deterministic features (B, D) of images (B, C, H, W), nothing hidden.

        `pool`: 'mean' over the patch tokens, 'cls' the class token (ConfigError without one), 'latent' the method's
        bottleneck (the mean where it has none).
        """
        return vit.pool(self.encoder, self.encoder.forward_features(images), pool)

    def feature_maps(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Patch features of chosen blocks (default: the last) for dense tasks: a list of (B, D, h, w)."""
        return vit.feature_maps(self.encoder, images, layers)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed (timm's convention); vectors are exempt anyway."""
        return set()
