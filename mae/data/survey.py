"""What lies in a source: sizes, kinds and damage, by looking at its images one by one."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae.data.decode import DamagedImage
from mae.data.sources import Source, file_of


class Look(NamedTuple):
    """What was seen of one image."""

    size: tuple[int, int]  # height, width in pixels, as it is read
    kind: str  # 'JPEG RGB', '8-bit, 1 channel'
    content: int | None  # bytes of its file


def survey(source: Source, ids: np.ndarray, *, threads: int) -> Iterator[Look | DamagedImage]:
    """Reads the images of those ids (M,) int64, in their order, as training would."""

    def look(index: int) -> Look | DamagedImage:
        try:
            return _look(source, index)
        except DamagedImage as error:
            return DamagedImage(error.name, error.reason)  # without its traceback and what hangs on it

    with ThreadPoolExecutor(max(threads, 1)) as pool:  # decoders let other threads run
        yield from pool.map(look, ids.tolist())


def _look(source: Source, index: int) -> Look:
    pixels = source.read(index)
    content = file_of(source, index)
    return Look(pixels.shape[:2], _kind(content) or _numbers(pixels), None if content is None else len(content))


def _kind(content: bytes | None) -> str | None:
    """Format and mode of an image file, as Pillow names them; None for what is none."""
    try:
        with Image.open(io.BytesIO(content or b"")) as image:
            return f"{image.format} {image.mode}"
    except Image.UnidentifiedImageError:
        return None


def _numbers(pixels: np.ndarray) -> str:
    depth = f"{8 * pixels.dtype.itemsize}-bit" if pixels.dtype.kind == "u" else str(pixels.dtype)
    return f"{depth}, {pixels.shape[2]} channel{'s' * (pixels.shape[2] > 1)}"
