"""Any encoder as a scikit-learn transformer: images in, vectors out, in a Pipeline, a GridSearchCV or alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from mae.data.decode import DamagedImage
from mae.data.given import Arrays, source_of
from mae.data.sources import Source, Subset
from mae.errors import ConfigError

if TYPE_CHECKING:  # torch is imported by fit
    from mae.config import Config
    from mae.methods.base import Autoencoder

POOLS = ("mean", "cls", "latent")


class Encoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The features of a trained encoder, which stays as it is: `fit` opens it, looks at one image and learns nothing.

    Images are an array (N, H, W) or (N, H, W, C), uint8, uint16 (white is 65535) or floats in [0, 1]; one row an image, (N, H * W * C)
    with `image_shape`, as scikit-learn's own data sets are; paths of files; or the path of a folder, whose images are taken in the order
    of their names. They are scaled to cover the encoder's images, centre-cropped, converted to its channels and normalised as it was
    trained.
    """

    def __init__(
        self,
        encoder: str | Path = "runs/digits-mae",
        *,
        pool: str = "mean",
        image_shape: tuple[int, ...] | None = None,
        resize: float = 1.0,
        batch_size: int = 256,
        device: str = "auto",
    ) -> None:
        """`encoder`: the folder of a run, a checkpoint file, timm:NAME or hf:NAME. `pool`: mean | cls | latent, the method's own code.

        `image_shape`: (H, W) or (H, W, C) of rows. `resize`: the shorter side before the centre crop, in sides of the encoder's images
        (224 from 256: 1.143, as `mae features` does). `device`: auto | cpu | cuda | cuda:N.
        """
        self.encoder = encoder
        self.pool = pool
        self.image_shape = image_shape
        self.resize = resize
        self.batch_size = batch_size
        self.device = device

    def fit(self, X: Any = None, y: Any = None) -> "Encoder":  # noqa: N803 (scikit-learn's name)
        """Opens the encoder, and checks that X are images of which it makes vectors; `y` is passed over. Raises ValueError."""
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is unknown: choose one of {', '.join(POOLS)}")
        with _as_value_errors():
            self.model_, self.config_ = _open(str(self.encoder), self.device)
            data, size = self.config_.data, self.config_.image_size
            source = Arrays(np.zeros((1, *size, data.channels), np.uint8), data.channels) if X is None else self._source(X)
            self._n_features_out = self._encoded(Subset(source, np.arange(1))).shape[1]
        if isinstance(X, np.ndarray) and X.ndim == 2:
            self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:  # noqa: N803
        """The images as vectors (N, D) float32, computed in float32. Raises ValueError for what is no image, by name."""
        check_is_fitted(self, "model_")
        with _as_value_errors():
            return self._encoded(self._source(X))

    def __sklearn_tags__(self) -> Tags:
        """What scikit-learn's tools may give it: arrays of images and paths; a matrix only where `image_shape` says what its rows are."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self.image_shape is not None
        tags.input_tags.three_d_array = tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _source(self, images: Any) -> Source:
        return source_of(images, self.config_.data.channels, self.image_shape)

    def _encoded(self, source: Source) -> np.ndarray:
        import torch

        from mae.data.batch import finished, normalise
        from mae.data.crops import central
        from mae.nets.products import wide_products

        size, data, device = self.config_.image_size, self.config_.data, next(self.model_.encoder.parameters()).device

        def pixels(index: int) -> torch.Tensor:
            image = central(source.read(index), size, self.resize)
            return finished(torch.from_numpy(image.transpose(2, 0, 1).copy()), data)

        vectors = []
        with torch.no_grad(), wide_products(device):
            for start in range(0, len(source), self.batch_size):
                images = torch.stack([pixels(i) for i in range(start, min(start + self.batch_size, len(source)))])
                vectors.append(self.model_.encode(normalise(images.to(device), data), self.pool).float().cpu().numpy())
        return np.concatenate(vectors)


def _open(encoder: str, device: str) -> "tuple[Autoencoder, Config]":
    """The model on its device in eval mode, and how it wants its images."""
    from mae.commands import encoders
    from mae.nets.vit import choose_attention
    from mae.training.distributed import device_of

    found = encoders.find(encoder)
    config = encoders.configure(["data.name=folder", "data.path=."], found.base)
    model = found.load().eval().to(device_of(device))
    choose_attention(model, device_of(device))
    return model, config


@contextlib.contextmanager
def _as_value_errors() -> Iterator[None]:
    """What scikit-learn's users and tools expect of bad input."""
    try:
        yield
    except (ConfigError, DamagedImage) as error:
        raise ValueError(str(error)) from error
