"""A Gaussian over codes with independent dimensions: Kingma & Welling, arXiv:1312.6114, appendix B."""

import math
from typing import NamedTuple

from torch import Tensor

from mae.nets import keyed

LOG_VARIANCE = (-30.0, 20.0)  # beyond these exp() leaves float32's comfortable range
LOG_TWO_PI = math.log(2 * math.pi)


class Gaussian(NamedTuple):
    """q(z | x), float32 at least."""

    mean: Tensor  # (B, ..., k)
    log_variance: Tensor  # (B, ..., k), within LOG_VARIANCE

    def sample(self, keys: Tensor) -> Tensor:
        """z = mean + deviation * eps (B, ..., k), differentiable; the keys (B,) decide eps."""
        eps = keyed.normal(keys, self.mean[0].numel(), "latent").view_as(self.mean)
        return self.mean + (0.5 * self.log_variance).exp() * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) of every dimension (B, ..., k), in nats."""
        return 0.5 * (self.mean.square() + self.log_variance.expm1() - self.log_variance)  # expm1: no cancellation at the prior

    def log_density(self, z: Tensor) -> Tensor:
        """log q(z) (B,) in nats of z (B, ..., k), summed over all dimensions."""
        return log_normal(z, self.mean, self.log_variance).flatten(1).sum(1)


def gaussian(moments: Tensor) -> Gaussian:
    """What a layer made, mean and log-variance side by side (B, ..., 2k), as a Gaussian: float32, the log-variance clamped."""
    mean, log_variance = (moments.float() if moments.itemsize < 4 else moments).chunk(2, dim=-1)
    return Gaussian(mean, log_variance.clamp(*LOG_VARIANCE))


def log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, exp(log_variance)) element by element, in nats."""
    return -0.5 * ((x - mean).square() * (-log_variance).exp() + log_variance + LOG_TWO_PI)
