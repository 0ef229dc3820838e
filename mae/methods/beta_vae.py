"""beta-VAE: Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework", ICLR 2017.

The VAE with a KL that weighs more than the evidence bound's 1. `capacity` trains it as Burgess et al., arXiv:1804.03599 do: the KL is
held at a number of nats that rises over the run, so that one latent after the other comes into use.
"""

from typing import Any

from mae.methods.vae import VAE
from mae.nets.encoders import Encoder


def create(encoder: Encoder, *, beta: float = 4.0, **arguments: Any) -> VAE:
    """A VAE with the paper's beta for small colour images; the other arguments are the VAE's. Raises ConfigError as it does."""
    return VAE(encoder, beta=beta, **arguments)
