"""Image bytes -> (H, W, C) uint8 by Pillow: one conversion for every kind of image, and refusal of what cannot be read.

The content decides the format, JPEG, PNG, WebP or TIFF, not the name. The first frame is taken, turned upright as its EXIF
orientation says where that can be read; 16 bits are scaled (65535 -> 255), never clipped; transparent pixels are laid over white;
CMYK, palettes, YCbCr and 1-bit images become RGB. channels=1 is ITU-R 601 luma. Colour profiles are not applied. 32-bit pixels have
no fixed range and are refused (data.name=arrays keeps them).
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mae.data import jpeg
from mae.errors import ConfigError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")  # each decoder more is one more that hostile bytes may reach
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # Pillow's own line between a picture and a decompression bomb: a quarter of a gigabyte as RGB

warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # ImageNet has some; the pixels are unharmed


class DamagedImage(Exception):
    """An image that cannot be read. Attributes: `name` (which one), `reason` (why, for the log)."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read: {self.reason}"


def decode(content: bytes, *, channels: int, name: str) -> np.ndarray:
    """The image in `content` as (H, W, channels) uint8 with channels 1 or 3. Raises DamagedImage, which tells `name`."""
    plain = jpeg.decode(content, channels=channels, most=MAX_PIXELS)
    if plain is not None:
        return plain
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:  # from the header, before anything is unpacked
            raise DamagedImage(name, f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        _turn_upright(image)
        pixels = np.asarray(_eight_bits(image).convert("L" if channels == 1 else "RGB"))
    except (DamagedImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on damaged bytes
        raise DamagedImage(name, _reason(content, error)) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def in_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Pixels (H, W, 1 or 3) uint8 as grey (ITU-R 601 luma) or RGB: (H, W, channels)."""
    if pixels.shape[2] == channels:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(*pixels.shape[:2], channels)


def decode_classes(file: Path) -> np.ndarray:
    """The classes of an image's pixels (H, W) uint8, from a PNG whose values, or palette indices, are these; 255 = not said.

    Raises ConfigError where there is no such file.
    """
    try:
        with Image.open(file, formats=("PNG",)) as image:
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"the mask {file} cannot be read ({_reason(b'-', error)}): every image needs one, a PNG of class numbers"
        ) from error
    if values.ndim != 2 or values.dtype == bool or values.max(initial=0) > 255:
        kind = "colours" if values.ndim != 2 else "other numbers"
        raise ConfigError(f"the mask {file} holds {kind}: give a grey or palette PNG whose values are class numbers from 0 to 254")
    return values.astype(np.uint8)


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return "no bytes"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no {', '.join(FORMATS)}, or its header is damaged"
    return " ".join(str(error).split()) or type(error).__name__


def _turn_upright(image: Image.Image) -> None:
    """By its EXIF or XMP orientation; where that is damaged the image, whose pixels may be sound, stays as it is."""
    try:
        image.getexif()
    except Exception:  # a dozen kinds again
        return
    ImageOps.exif_transpose(image, in_place=True)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An opaque image of 8-bit channels."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillow's name for 16 bits in a PNG
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed range: convert them to 8 or 16 bits, or choose data.name=arrays")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image
