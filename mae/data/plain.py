"""Plain JPEGs, the files that are nearly all of most data sets: found with their crops drawn, before anything is unpacked.

Two take their own way from there: mae.data.packed on a GPU, and `Regions` here, which unpacks only the crop. Everything else, and
whatever these cannot unpack, is read the usual way, which knows what becomes of damaged images.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.data import crops, jpeg, region
from mae.data.batch import Samples
from mae.data.decode import MAX_PIXELS, DamagedImage
from mae.data.reading import Reading
from mae.data.resample import resized
from mae.data.sources import Source, file_of
from mae.errors import ConfigError
from mae.keys import Data

HELD = 32  # files in memory at once: fewer cost more draws of crops
PIXELS = 1 << 23  # with which a call that unpacks crops is full: fewer cost more calls, more cost memory where photos are large
ENOUGH = 64  # images by which to judge whether crops come out

Read = Callable[[np.ndarray, np.ndarray], Samples | ConfigError]  # of ids and keys


class Plain(NamedTuple):
    """The plain JPEGs of a batch."""

    files: list[bytes]
    places: np.ndarray  # (P,) int64: where in the batch
    boxes: np.ndarray  # (P, 4) int64: top, left, height, width of the crops
    flips: np.ndarray  # (P,) bool


def plain_jpegs(source: Source, data: Data, size: tuple[int, int], ids: np.ndarray, keys: np.ndarray, reading: Reading) -> Plain:
    """Those among the samples with ids (B,) and keys (B,), both int64, for crops of `size` (h, w).

    What is done next counts as reading the last of them, until the caller notes something else.
    """
    files, places, sizes = [], [], []
    for place, index in enumerate(ids.tolist()):
        reading.note(index)
        try:
            content = file_of(source, index)
        except DamagedImage:
            continue
        found = jpeg.plain(content, channels=data.channels, most=MAX_PIXELS) if content else None
        if found is not None and content is not None:
            files.append(content)
            places.append(place)
            sizes.append(found)
    own, (tall, wide) = keys[places], np.array(sizes, np.int64).reshape(-1, 2).T
    boxes = crops.boxes(own, tall, wide, scale=(data.crop_scale[0], data.crop_scale[1]), aspect=size[1] / size[0])
    flips = crops.flips(own) if data.flip else np.zeros(len(own), bool)
    return Plain(files, np.array(places, np.int64), boxes, flips)


def numbers_of(source: Source, ids: np.ndarray, keys: np.ndarray, shown: np.ndarray) -> Tensor:
    """(3, B) int64: keys, labels, ids of samples (B,) whose labels are those of the images `shown` (B,)."""
    labels = np.full_like(ids, -1) if source.labels is None else source.labels[shown]
    return torch.from_numpy(np.stack([keys, labels, ids]))


def combined(images: Tensor, numbers: Tensor, parts: list[tuple[np.ndarray, Samples]]) -> Samples:
    """Samples whose `images` (B, C, h, w) and `numbers` (3, B) lack `parts`, each at its places (P,) int64 in the batch."""
    numbers, replaced, damage = numbers.clone(), np.zeros(len(images), bool), []
    for places, samples in parts:
        images[places], numbers[:, places] = samples.images.to(images.device), samples.numbers
        replaced[places] = samples.replaced
        damage += samples.damage
    return Samples(images, numbers, replaced, damage)


class Regions:
    """What `TrainSteps.read` does, unpacking of plain JPEGs no more than their crops: the same pixels, to the bit, in less time."""

    def __init__(self, source: Source, data: Data, size: tuple[int, int], reading: Reading, usual: Read) -> None:
        """`usual` reads samples one by one, whatever they are."""
        self.source, self.data, self.size, self.reading, self.usual = source, data, size, reading, usual
        self.tried = self.done = 0

    def read(self, ids: np.ndarray, keys: np.ndarray) -> Samples | ConfigError:
        """The samples of those ids (B,) with keys (B,), both int64; or the error that says why not."""
        if not (self._useful() and region.loads()):
            return self.usual(ids, keys)
        images = torch.empty(len(ids), self.data.channels, *self.size, dtype=torch.uint8)
        done = np.zeros(len(ids), bool)
        for start in range(0, len(ids), HELD):
            part = slice(start, start + HELD)
            self._fill(images[part], done[part], ids[part], keys[part])
        self.tried, self.done = self.tried + len(ids), self.done + int(done.sum())
        rest, parts = np.flatnonzero(~done), []
        if len(rest):
            others = self.usual(ids[rest], keys[rest])
            if isinstance(others, ConfigError) or not done.any():
                return others
            parts = [(rest, others)]
        samples = combined(images, numbers_of(self.source, ids, keys, ids), parts)
        self.reading.note(-1)
        return samples

    def _useful(self) -> bool:
        """What gives no crop is read twice, which a folder of PNGs need not bear for long."""
        return self.tried < ENOUGH or 4 * self.done >= self.tried

    def _fill(self, images: Tensor, done: np.ndarray, ids: np.ndarray, keys: np.ndarray) -> None:
        """Those of the images (B, C, h, w) whose crops can be unpacked, and notes in `done` (B,) bool which these are."""
        found = plain_jpegs(self.source, self.data, self.size, ids, keys, self.reading)
        some = [i for i, file in enumerate(found.files) if region.suits(file, found.boxes[i])]
        filled = np.cumsum(found.boxes[some, 2:].prod(1)) // PIXELS  # how many calls the crops so far would fill
        for number in np.unique(filled):
            call = np.array(some)[filled == number]
            cuts = region.decode([found.files[i] for i in call], found.boxes[call])
            for place, flip, cut in zip(found.places[call].tolist(), found.flips[call].tolist(), cuts, strict=True):
                if cut is not None:
                    images[place] = resized(torch.from_numpy(cut).permute(2, 0, 1), flip, self.size)
                    done[place] = True
