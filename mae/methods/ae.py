"""Autoencoder with a bottleneck: Hinton & Salakhutdinov, Science 313 (2006).

An image becomes a short code, and the code an image again:

    loss = mean over the batch of sum over pixels of (image - decode(code(image)))^2

A ViT keeps as many numbers as the image has: without a bottleneck it would learn the identity.
"""

from torch import Tensor

from mae.methods import losses
from mae.methods.base import Autoencoder, Batches, Diagnosis, Output, code_rank
from mae.nets.bottleneck import Bottleneck
from mae.nets.decoder import image_decoder
from mae.nets.encoders import Encoder


class AE(Autoencoder):
    """`bottleneck: global` keeps one code of `bottleneck_size` numbers an image, `token` one a patch; ConfigError as Bottleneck.

    `loss: bce` takes pixels in [0, 1] (data.mean=[0] data.std=[1]) as probabilities; its floor on grey images is their entropy, not zero.
    """

    separable = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        bottleneck: str = "global",
        bottleneck_size: int = 32,
        loss: str = "mse",
        decoder_depth: int | str = "auto",
        decoder_width: int | str = "auto",
        decoder_heads: int | str = "auto",
    ) -> None:
        super().__init__(encoder)
        self.bottleneck = Bottleneck(encoder, kind=bottleneck, size=bottleneck_size, width=encoder.embed_dim)
        self.decoder = image_decoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads, inputs=encoder.embed_dim)
        self.probabilities = loss == "bce"

    def forward(self, images: Tensor, *, keys: Tensor) -> Output:
        """The loss of images (B, C, H, W); nothing is random."""
        made = self.decoder(self.bottleneck.decode(self.latent(images)))
        loss = losses.binary_cross_entropy(made, images) if self.probabilities else losses.squared_error(made, images)
        return Output(loss, {"loss_per_pixel": loss.detach() / images[0].numel()})

    def code(self, tokens: Tensor) -> Tensor:
        """The code (B, bottleneck_size) or (B, N, bottleneck_size) of the encoder's tokens (B, P + N, D)."""
        return self.bottleneck.encode(tokens)

    def decode(self, latents: Tensor) -> Tensor:
        """Codes -> images (B, C, H, W)."""
        made = self.decoder(self.bottleneck.decode(latents))
        return made.sigmoid() if self.probabilities else made

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) after the passage through the bottleneck."""
        return self.decode(self.latent(images))

    def diagnose(self, batches: Batches) -> Diagnosis:
        """The rank of the code on held-out images."""
        return code_rank(self.latent(images) for images, _ in batches)
