"""data.decode=gpu: JPEGs go to the device as they are, and are unpacked, cropped and mirrored there.

A reading process only looks at the headers of plain JPEGs and draws their crops; everything else it decodes as ever. What the device
cannot unpack is read again the usual way, which knows what becomes of damaged images. The pixels are those of another decoder and
filter (nvJPEG, float32): single ones differ by a level or two from the CPU's, so that data.decode is part of what a run is.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.data.batch import Samples
from mae.data.plain import Plain, Read, combined, numbers_of, plain_jpegs
from mae.data.reading import Reading
from mae.data.resample import resized
from mae.data.sources import Source
from mae.errors import ConfigError
from mae.keys import Data

log = logging.getLogger("mae")

END = b"\xff\xd9"  # the marker of a JPEG's end
TOGETHER = 32  # images on the device at their own sizes
ENOUGH = 64  # images by which to judge whether the device unpacks any


class Packed(NamedTuple):
    """A step's samples before they are unpacked; few tensors, since each costs a file descriptor on its way."""

    files: Tensor  # (bytes,) uint8: the plain JPEGs one after the other
    table: Tensor  # (P, 7) int64 of each: its end among the bytes, its place in the batch; top, left, height, width, flip of its crop
    numbers: Tensor  # (3, B) int64: keys, labels, ids
    others: Samples | None  # those that are no plain JPEGs, in the order of their places


class Packing:
    """What `TrainSteps.read` does, half of it on the device."""

    def __init__(self, source: Source, data: Data, size: tuple[int, int], reading: Reading, usual: Read) -> None:
        """`usual` reads samples one by one, whatever they are."""
        self.source, self.data, self.size, self.reading, self.usual = source, data, size, reading, usual
        self.tried, self.judged = 0, False

    def pack(self, ids: np.ndarray, keys: np.ndarray) -> Packed | ConfigError:
        """The samples of those ids (B,) with keys (B,), both int64, before they are unpacked; or the error that says why not."""
        found = _ended(plain_jpegs(self.source, self.data, self.size, ids, keys, self.reading))
        rest = np.setdiff1d(np.arange(len(ids)), found.places)
        others = self.usual(ids[rest], keys[rest]) if len(rest) else None
        if isinstance(others, ConfigError):
            return others
        numbers = numbers_of(self.source, ids, keys, ids)
        if found.files:
            table = np.column_stack([np.cumsum([len(file) for file in found.files]), found.places, found.boxes, found.flips])
            joined = np.frombuffer(b"".join(found.files), np.uint8).copy()
            packed = Packed(torch.from_numpy(joined), torch.from_numpy(table), numbers, others)
        else:
            packed = Packed(torch.empty(0, dtype=torch.uint8), torch.empty(0, 7, dtype=torch.int64), numbers, others)
        self.reading.note(-1)
        return packed

    def unpack(self, packed: Packed, device: torch.device) -> Samples:
        """The samples, images (B, C, h, w) uint8 on the device. Raises ConfigError where too much is damaged."""
        count = packed.numbers.shape[1]
        images = torch.empty(count, self.data.channels, *self.size, dtype=torch.uint8, device=device)
        table = packed.table.tolist()
        parts = [] if packed.others is None else [(np.setdiff1d(np.arange(count), [row[1] for row in table]), packed.others)]
        failed: dict[int, RuntimeError] = {}  # by their places
        for image, (_, place, top, left, height, width, flip) in zip(self._decoded(packed, table, device), table, strict=True):
            if isinstance(image, RuntimeError):
                failed[place] = image
            else:
                images[place] = resized(image[:, top : top + height, left : left + width], bool(flip), self.size)
        self._judge(len(table), failed)
        if failed:
            places = np.array(list(failed))
            again = self.usual(packed.numbers[2].numpy()[places], packed.numbers[0].numpy()[places])
            if isinstance(again, ConfigError):
                raise again
            parts.append((places, again))
        return combined(images, packed.numbers, parts)

    def _judge(self, tried: int, failed: dict[int, RuntimeError]) -> None:
        """Warns once where the device unpacks nothing at all, as a torchvision without nvJPEG does: everything is then read twice."""
        self.tried, self.judged = self.tried + tried, self.judged or len(failed) < tried
        if not self.judged and self.tried >= ENOUGH:
            self.judged, why = True, str(next(iter(failed.values()))).split("\n")[0]
            log.warning("data.decode=gpu: none of the first %d JPEGs can be unpacked there (%s): choose data.decode=cpu", self.tried, why)

    def _decoded(self, packed: Packed, table: list[list[int]], device: torch.device) -> Iterator[Tensor | RuntimeError]:
        """(C, H, W) uint8 on the device of every plain JPEG, or why it cannot be unpacked there."""
        files = packed.files.tensor_split([row[0] for row in table[:-1]])
        for start in range(0, len(table), TOGETHER):
            yield from _unpacked(list(files[start : start + TOGETHER]), self.data.channels, device)


def _ended(found: Plain) -> Plain:
    """Those that end as a JPEG does: a device may unpack a file that was cut, and say nothing."""
    kept = [i for i, file in enumerate(found.files) if file.endswith(END)]
    return Plain([found.files[i] for i in kept], found.places[kept], found.boxes[kept], found.flips[kept])


def _unpacked(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor | RuntimeError]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision's decoders are to move to torchcodec
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            return list(decode_jpeg(files, mode=ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB, device=device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # one of them is damaged: which one?
            return [error] if len(files) == 1 else [_unpacked([file], channels, device)[0] for file in files]
