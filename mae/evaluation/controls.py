"""Controls: what the same protocol makes of raw pixels, of their principal components and of the encoder before it learnt anything.

A figure of an encoder means little without them. They do not depend on the run, so they are measured once and kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional as F

from mae.config import Config
from mae.errors import ConfigError
from mae.evaluation.features import encoder_hash, gather, pass_over, transform_of
from mae.evaluation.material import Features, Material
from mae.evaluation.subject import Subject
from mae.methods.base import Autoencoder
from mae.nets.pixels import reduced
from mae.nets.sizes import patch_size

PIXEL_SIDE = 32  # images are reduced to at most this many pixels a side
WHOLE = 4096  # numbers of an image up to which their covariance is decomposed: for 13 channels that takes most of an hour


class Control(NamedTuple):
    """Something to compare an encoder with."""

    name: str
    definition: dict[str, Any]  # all that decides it, apart from the images
    material: Callable[[], Material]  # computed when first asked for
    subject: Callable[[], Subject]  # the same as a model, for evaluators that read the images themselves


def define(subject: Subject, untrained: Callable[[], Autoencoder]) -> list[Control]:
    """The three controls for a subject. `untrained` builds the encoder as it was before training, always the same; its features are
    kept where the subject's are.
    """
    subject = replace(subject, open_other=None)
    config, splits = subject.config, subject.splits
    raw = cache(lambda: gather(lambda source: pass_over(source, config, _pixels, device=subject.device), splits))
    transform = transform_of(config)
    components = min(subject.model.encoder.embed_dim, _pixel_count(config), len(splits.train) - 1)
    patch = patch_size(config.encoder.name, config.encoder.patch_size)  # of the pixels' feature maps
    fresh = replace(subject, model=untrained().to(subject.device))

    axes = cache(lambda: principal(raw().train["mean"].x, components))

    def fixed(model: Fixed) -> Subject:
        return replace(subject, model=model.to(subject.device), kept=None)

    start = {"hash": encoder_hash(fresh.model), "precision": subject.precision, **transform}
    return [
        Control("control:pixels", {"side": PIXEL_SIDE, "patch": patch, **transform}, raw, cache(lambda: fixed(Fixed(config)))),
        Control(
            "control:pca",
            {"side": PIXEL_SIDE, "width": components, **transform},
            cache(lambda: project(raw(), *axes())),
            cache(lambda: fixed(Fixed(config).along(*axes()))),
        ),
        Control("control:untrained", start, lambda: fresh.material, lambda: fresh),
    ]


def project(material: Material, mean: Tensor, directions: Tensor) -> Material:
    """Features along directions: (N, D) -> (N, width), centred."""

    def projected(split: dict[str, Features]) -> dict[str, Features]:
        return {pool: Features(((f.x.double() - mean) @ directions).float(), f.y) for pool, f in split.items()}

    train, validation, test = (projected(split) for split in (material.train, material.validation, material.test))
    return Material(train, validation, test, material.positions, material.classes)


def principal(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The mean (D,) of vectors (N, D) and their first directions (D, width) of largest variance, in float64."""
    mean = x.double().mean(0)
    if x.shape[1] > WHOLE:
        centred = (x.double() - mean).cpu().numpy()
        rows = svds(centred, k=width, v0=np.ones(min(centred.shape)))[2]  # the largest last
        return mean, torch.from_numpy(rows[::-1].T.copy()).to(x.device)
    covariance = sum(part.T @ part for part in ((some.double() - mean) for some in x.split(4096)))  # (D, D)
    return mean, torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width]


class Fixed(Autoencoder):
    """Raw pixels, or their principal components, in the place of an encoder: for protocols that read the images themselves."""

    learns = False
    mean: Tensor | None  # (D,), where components are taken
    directions: Tensor | None  # (D, width)

    def __init__(self, config: Config) -> None:
        super().__init__(nn.Identity())  # type: ignore[arg-type]  # it encodes itself: nobody asks for its encoder
        self.width = _pixel_count(config)
        self.shape = (config.data.channels, *config.image_size)
        self.patch = patch_size(config.encoder.name, config.encoder.patch_size)
        self.register_buffer("mean", None)
        self.register_buffer("directions", None)

    def along(self, mean: Tensor, directions: Tensor) -> "Fixed":
        """From here on the components of pixels: mean (D,), directions (D, width); returns itself."""
        self.width = directions.shape[1]
        self.mean, self.directions = mean.float(), directions.float()
        return self

    def encode(self, images: Tensor, pool: str = "mean") -> Tensor:
        """(B, C, H, W) normalised -> (B, width), for every pool."""
        x = reduced(images.float(), PIXEL_SIDE)
        return x if self.mean is None or self.directions is None else (x - self.mean) @ self.directions

    def feature_maps(self, images: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """The pixels of every patch: (B, C, H, W) -> [(B, C * p * p, H / p, W / p)]. Raises ConfigError for components of whole images."""
        if self.directions is not None:
            raise ConfigError("components of whole images have no patches: take the pixels")
        return [F.pixel_unshuffle(images.float(), self.patch)]

    # properties, so that evaluators, which ask by name, find them only where an image can be made of the components
    @property
    def decode(self) -> Callable[[Tensor], Tensor]:
        """Components (B, width) -> images (B, C, H, W), where no pixel was averaged away."""
        mean, directions = self.mean, self.directions
        if mean is None or directions is None or len(mean) != math.prod(self.shape):
            raise AttributeError("these components are not of whole images")
        return lambda components: (components @ directions.T + mean).view(len(components), *self.shape)

    @property
    def reconstruct(self) -> Callable[[Tensor], Tensor]:
        """Images (B, C, H, W) from their components."""
        decode = self.decode
        return lambda images: decode(self.encode(images))


def _pixels(images: Tensor) -> dict[str, Tensor]:
    """(B, C, H, W) -> (B, C * h * w) with h, w at most 32."""
    return {"mean": reduced(images, PIXEL_SIDE)}


def _pixel_count(config: Config) -> int:
    height, width = config.image_size
    return config.data.channels * min(height, PIXEL_SIDE) * min(width, PIXEL_SIDE)
