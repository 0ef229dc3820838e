"""Images of any number of channels and more than 8 bits, as satellites and microscopes give: .npy, .npz and .tif files in folders.

They are float32 from the file to the network: 8- and 16-bit whole numbers scaled to [0, 1] (65535 -> 1), never clipped, all other
numbers as they are. Axes are (H, W), (H, W, C) or (C, H, W), C being data.channels; the pages of a TIFF are channels. Nothing is turned
or converted, and pickles are refused.
"""

import io
import math
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mae.data.decode import MAX_PIXELS, DamagedImage
from mae.data.folder import Kind, open_folder
from mae.data.sources import Opened
from mae.errors import ConfigError
from mae.keys import Data

WIDTH, HEIGHT, BITS, SAMPLES, PLANAR = 256, 257, 258, 277, 284  # tags of TIFF 6.0
NAMED = "image"  # the array that is taken of several in a .npz


def open_arrays(data: Data) -> Opened:
    """The arrays under `data.path`, in the folders or the list that `open_folder` knows. Raises ConfigError as it does."""
    return open_folder(data, ARRAYS)


def decode_array(content: bytes, *, channels: int, name: str) -> np.ndarray:
    """The image in `content` as (H, W, channels) float32.

    Raises DamagedImage, which tells `name`, and ConfigError for a TIFF that takes a library that is not installed.
    """
    try:
        reader = next((read for start, read in _READERS.items() if content.startswith(start)), None)
        if reader is None:
            raise ValueError("no NPY, NPZ or TIFF, or its header is damaged" if content else "no bytes")
        return _scaled(reader(content, channels, name))
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # zip files and TIFFs raise a dozen kinds
        raise DamagedImage(name, " ".join(str(error).split()) or type(error).__name__) from error


def _npy(content: bytes, channels: int, name: str) -> np.ndarray:
    return _array(io.BytesIO(content), channels)


def _npz(content: bytes, channels: int, name: str) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.namelist()
        if len(members) > 1 and f"{NAMED}.npy" not in members:
            raise ValueError(f"it holds {len(members)} arrays, and none of the name {NAMED!r}")
        with archive.open(members[0] if len(members) == 1 else f"{NAMED}.npy") as member:
            return _array(member, channels)


def _array(stream: Any, channels: int) -> np.ndarray:
    """An NPY stream as (H, W, C); its shape is read before its values, which a zip may have packed a thousandfold."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its NPY version {version} is unknown")
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = header(stream)
    if kind.hasobject or kind.kind not in "biuf":
        raise ValueError(f"its values are {kind}, which are no numbers of pixels")
    arrange = _arrangement(shape, channels)
    raw = stream.read(math.prod(shape) * kind.itemsize)
    values = np.frombuffer(raw, kind)
    if values.size != math.prod(shape):
        raise ValueError("it is cut short")
    return arrange(values.reshape(shape, order="F" if by_columns else "C"))


def _tiff(content: bytes, channels: int, name: str) -> np.ndarray:
    start = content[:8] if content[2:4] in (b"*\0", b"\0*") else content[:16]  # BigTIFF's header is longer
    directory, stream = ImageFileDirectory_v2(start), io.BytesIO(content)
    stream.seek(directory.next)
    directory.load(stream)
    width, height, samples = directory[WIDTH], directory[HEIGHT], directory.get(SAMPLES, 1)
    _check_pixels(height, width)
    plain = samples == 1 or (samples in (3, 4) and max(directory.get(BITS, (1,))) <= 8 and directory.get(PLANAR, 1) == 1)
    return _by_pillow(stream, channels) if plain else _by_tifffile(stream, channels, name)


def _by_pillow(stream: io.BytesIO, channels: int) -> np.ndarray:
    """Grey pages of any depth, each a channel, or 8-bit colours."""
    with Image.open(stream, formats=("TIFF",)) as image:
        if image.mode == "P":
            raise ValueError("its values are places in a palette: data.name=folder reads colours")
        pages, bands = getattr(image, "n_frames", 1), len(image.getbands())
        shape = (image.height, image.width, bands) if bands > 1 else (pages, image.height, image.width)
        arrange = _arrangement(shape, channels)
        if bands > 1:
            return arrange(np.asarray(image))
        found = []
        for page in range(pages):
            image.seek(page)
            if image.size != (shape[2], shape[1]):
                raise ValueError("its pages differ in size")
            found.append(np.asarray(image))
        return arrange(np.stack(found))


def _by_tifffile(stream: io.BytesIO, channels: int, name: str) -> np.ndarray:
    """Many channels, or more than 8 bits of each of three."""
    try:
        import tifffile
    except ImportError as error:
        raise ConfigError(f"{name} is a TIFF of many or of deep channels, for tifffile: pip install tifffile imagecodecs") from error
    stream.seek(0)
    with tifffile.TiffFile(stream) as file:
        series = file.series[0]
        shape = tuple(side for side in series.shape if side > 1)
        arrange = _arrangement(shape, channels)
        return arrange(series.asarray().reshape(shape))


def _arrangement(shape: tuple[int, ...], channels: int) -> Callable[[np.ndarray], np.ndarray]:
    """What takes an array of this shape to (H, W, channels). Raises ValueError for another number of channels and for too many pixels."""
    if len(shape) == 2 and channels == 1:
        _check_pixels(*shape)
        return lambda values: values[..., None]
    if len(shape) == 3 and shape[2] == channels:
        _check_pixels(*shape[:2])
        return lambda values: values
    if len(shape) == 3 and shape[0] == channels:
        _check_pixels(*shape[1:])
        return lambda values: values.transpose(1, 2, 0)
    sizes = " x ".join(map(str, shape))
    way_out = f": set data.channels={min(shape[0], shape[-1])}" if len(shape) == 3 else ": set data.channels=1" if len(shape) == 2 else ""
    raise ValueError(f"its shape {sizes} has no {channels} channels{way_out}")


def _check_pixels(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are {'none' if height * width == 0 else f'more than {MAX_PIXELS:,}'}")


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """float32: uint8 and uint16 of their largest value, other numbers as they are. Raises ValueError for what is not finite."""
    largest = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2 else 1
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(pixels, np.float32)
    if largest > 1:
        return values / np.float32(largest)
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(f"{1 - finite.mean():.2%} of its values are not finite: fill them in")
    return values


_READERS = {b"\x93NUMPY": _npy, b"PK\x03\x04": _npz, b"II*\0": _tiff, b"MM\0*": _tiff, b"II+\0": _tiff, b"MM\0+": _tiff}
ARRAYS = Kind((".npy", ".npz", ".tif", ".tiff"), decode_array)
