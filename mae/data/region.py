"""Only the crop of a JPEG, not the whole of it: nvImageCodec's libjpeg-turbo, on the CPU, where it is installed (the extra `jpeg`).

Rows and columns outside the crop are neither transformed nor coloured, and nothing below it is unpacked at all. Settings and so pixels
are those of mae.data.jpeg, to the bit; what it cannot unpack is left to the caller.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np

from mae.data import jpeg

NAME = "nvidia.nvimgcodec"
CPU_ONLY = -99999  # nvImageCodec's NVIMGCODEC_DEVICE_CPU_ONLY, which Python does not name
END = b"\xff\xd9"  # JPEG's marker of the end
BASELINE = (0xC0, 0xC1)  # markers of sequential JPEGs with Huffman codes


def available() -> bool:
    """Whether nvImageCodec is installed."""
    with contextlib.suppress(ModuleNotFoundError):  # there may be no package `nvidia` at all
        return util.find_spec(NAME) is not None
    return False


def loads() -> bool:
    """Whether this process can use nvImageCodec, which the first call loads."""
    return _decoder() is not None


def suits(file: bytes, box: np.ndarray) -> bool:
    """Whether a plain JPEG and the box (4,) of its crop are for `decode`.

    One whose damage below the crop would be found by who reads so far is not, as it would be sound in some epochs only: one that was cut
    off, or has a marker among its pixels where there should be none (other damage there changes pixels, and is no error). Nor is a
    progressive one, whose crops differ from the whole where scans are missing; nor a single column, where libjpeg-turbo's interpolation
    of colours takes the crop's edge for the image's.
    """
    if box[3] < 2 or not file.endswith(END):
        return False
    ends = {marker: end for marker, _, end in jpeg.segments(file)}
    if ends.get(jpeg.SCAN, len(file)) > len(file) - len(END) or ends.keys().isdisjoint(BASELINE):
        return False
    pixels = np.frombuffer(file, np.uint8, offset=ends[jpeg.SCAN])
    marked = (pixels[:-1] == 0xFF) & (pixels[1:] != 0)
    # one for the end; others are looked at, where decoding may start again
    return bool(np.count_nonzero(marked) == 1 or (pixels[1:][marked][:-1] & 0xF8 == 0xD0).all())


def decode(files: list[bytes], boxes: np.ndarray) -> list[np.ndarray | None]:
    """The crop (height, width, 3) uint8 of every plain JPEG, None where it cannot be unpacked; good until the next call.

    `boxes` (B, 4) int64: top, left, height, width in pixels, inside the images.
    """
    loaded = _decoder()
    if loaded is None:
        return [None] * len(files)
    codec, decoder, kept = loaded
    again = {"images": kept[:]} if len(kept) == len(files) else {}  # memory that has been touched is faster
    kept.clear()
    try:
        regions = [codec.Region(top, left, top + height, left + width) for top, left, height, width in boxes.tolist()]
        views = [codec.CodeStream(file).get_sub_code_stream(region=region) for file, region in zip(files, regions, strict=True)]
        found = decoder.decode(views, params=codec.DecodeParams(apply_exif_orientation=False), **again)
        cuts = [None if image is None else np.asarray(image) for image in found]
    except Exception:  # a foreign library's
        return [None] * len(files)
    if all(image is not None for image in found):
        kept += found
    return cuts


@lru_cache(maxsize=1)
def _decoder() -> tuple[Any, Any, list[Any]] | None:
    """(module, decoder, its latest images) of this process, as its threads do not survive a fork; None where it cannot be loaded."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for place in util.find_spec(NAME).submodule_search_locations:  # type: ignore[union-attr]
                for file in (Path(place) / "extensions").glob("libjpeg_turbo_ext.*"):
                    (Path(folder) / file.name).symlink_to(file)
            # the other extensions complain of CUDA libraries that nobody needs; of damage we tell ourselves, by name
            with _environment(NVIMGCODEC_EXTENSIONS_PATH=folder, PYNVIMGCODEC_VERBOSITY="0"):
                codec = import_module(NAME)
                backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
                return codec, codec.Decoder(device_id=CPU_ONLY, max_num_cpu_threads=1, backends=backends), []
    except Exception as error:  # a foreign library's
        logging.getLogger("mae").warning("nvImageCodec cannot be used (%s): images are unpacked whole", error)
        return None


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
