"""The narrow place between encoder and decoder: one code for the whole image, or one for every patch."""

from torch import Tensor, nn

from mae.errors import ConfigError
from mae.nets import sizes, vit
from mae.nets.encoders import Encoder

KINDS = ("global", "token")


class Bottleneck(nn.Module):
    """Linear maps from an encoder's tokens to a code and from the code to the decoder's tokens.

    `global`: the mean over patches becomes one code (B, size), which is spread over all places. `token`: every patch keeps a code of
    its own, (B, N, size). `moments` codes are made at once (2 for a mean and a log-variance).
    Raises ConfigError for an unknown kind and for a code that is no narrower than what it shall sum up.
    """

    def __init__(self, encoder: Encoder, *, kind: str, size: int, width: int, moments: int = 1) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"method.bottleneck {kind} is unknown: choose one of {', '.join(KINDS)}")
        self.places = encoder.patch_embed.num_patches
        self.prefix = encoder.num_prefix_tokens
        self.kind, self.size = kind, size
        sizes.code(size, vit.patch_values(encoder) * (self.places if kind == "global" else 1), encoder.embed_dim, kind)
        self.squeeze = nn.Linear(encoder.embed_dim, moments * size)
        self.spread = nn.Linear(size, width * (self.places if kind == "global" else 1))
        vit.initialise(self)

    def encode(self, tokens: Tensor) -> Tensor:
        """The encoder's tokens (B, P + N, D) -> (B, moments * size) or (B, N, moments * size)."""
        patches = tokens[:, self.prefix :]
        return self.squeeze(patches.mean(1) if self.kind == "global" else patches)

    def decode(self, code: Tensor) -> Tensor:
        """A code (B, size) or (B, N, size) -> a token for every place (B, N, width)."""
        spread = self.spread(code)
        return spread.unflatten(-1, (self.places, -1)) if self.kind == "global" else spread
