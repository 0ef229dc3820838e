"""timm's training augmentation for probing and fine-tuning, repeatable sample by sample.

timm draws from the generators of torch, NumPy and random: all three are seeded from the sample's key before each image, so that
an augmented image is a function of (seed, epoch, id) like everything else.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mae.data import crops
from mae.data.batch import finished
from mae.data.resample import crop_one
from mae.errors import ConfigError
from mae.keys import Data


class KeyedTransform:
    """Callable (image (H, W, C), key) -> normalised float32 (C, H, W). Picklable, for worker processes.

    Images of more than 8 bits a channel, float32, are what Pillow and so timm's augmentation cannot hold: they are cropped and mirrored
    as in pretraining, and erased by timm. Raises ConfigError for them where RandAugment is asked for.
    """

    def __init__(self, data: Data, size: tuple[int, int], *, auto_augment: str | None = None, erase: float = 0.0) -> None:
        self.data, self.size = data, size
        if data.name == "arrays":
            if auto_augment is not None:
                raise ConfigError(
                    f"protocol.auto_augment={auto_augment} is for 8-bit colours, not for arrays: set protocol.auto_augment=none"
                )
            self.erasing = RandomErasing(erase, mode="pixel", device="cpu")
            return
        self.transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=(data.channels, *size),
            is_training=True,
            scale=(data.crop_scale[0], data.crop_scale[1]),
            hflip=0.5 if data.flip else 0.0,
            color_jitter=None,  # type: ignore[arg-type]  # timm asks whether it is None
            auto_augment=auto_augment,
            interpolation="bicubic",
            mean=tuple(data.mean),
            std=tuple(data.std),
            re_prob=erase,
            re_mode="pixel",
        )

    def __call__(self, image: np.ndarray, key: int) -> Tensor:
        if image.dtype != np.uint8:
            return self._of_floats(image, key)
        with seeded(key):
            return self.transform(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image))

    def _of_floats(self, image: np.ndarray, key: int) -> Tensor:
        keys, (height, width), scale = np.array([key]), self.size, self.data.crop_scale
        box = crops.boxes(keys, np.array(image.shape[:1]), np.array(image.shape[1:2]), scale=(scale[0], scale[1]), aspect=width / height)[0]
        pixels = finished(crop_one(image, box, self.data.flip and bool(crops.flips(keys)[0]), self.size), self.data)
        with seeded(key):
            return self.erasing(pixels)


class seeded:  # noqa: N801 (a context manager, used like a function)
    """While entered, the global generators of torch, NumPy and random run from a key; afterwards they go on as before."""

    def __init__(self, key: int) -> None:
        self.key = key

    def __enter__(self) -> None:
        self.before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        # not torch.manual_seed: where no GPU is in use it files one deferred call for each kind of accelerator, stack trace and all
        torch.default_generator.manual_seed(self.key)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(self.key)
        np.random.seed(self.key & 0xFFFFFFFF)
        random.seed(self.key)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.before[0])
        np.random.set_state(self.before[1])
        random.setstate(self.before[2])
