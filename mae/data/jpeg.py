"""The fast road for what nearly all photographs are: an upright baseline or progressive JPEG of one or three 8-bit channels.

simplejpeg unpacks with the same libjpeg-turbo settings as Pillow and torchvision (accurate DCT, smooth chroma), so that the pixels are
equal to the bit, at two thirds of Pillow's time. Whatever is not that plain, or damaged in any way, is left to Pillow, which decides
what becomes of it.
"""

import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow does it all
    simplejpeg = None

ORIENTATION = 0x0112  # EXIF
# EXIF's orientation in either byte order where it is not the one short number 1; XMP's, whatever it says
TURNED = re.compile(rb"\x12\x01\x03\0(?!\x01\0\0\0\x01)|\x01\x12\0\x03(?!\0\0\0\x01\0\x01)|rientation")
APP1, SCAN = 0xE1, 0xDA  # JPEG's markers: of EXIF and XMP; of the pixels


def decode(content: bytes, *, channels: int, most: int) -> np.ndarray | None:
    """(H, W, channels) uint8, channels 1 or 3; None for anything but a plain, sound JPEG of at most so many pixels."""
    if plain(content, channels=channels, most=most) is None:
        return None
    try:
        return simplejpeg.decode_jpeg(content, "GRAY" if channels == 1 else "RGB")  # strict: a warning is an error
    except ValueError:
        return None


def plain(content: bytes, *, channels: int, most: int) -> tuple[int, int] | None:
    """(height, width) of what is by its header a plain JPEG of at most so many pixels that has so many channels; else None."""
    if simplejpeg is None or content[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    fit = ("Gray", "YCbCr") if channels == 3 else ("Gray",)  # grey of a colour image: Pillow's, whose rounding is its own
    return (height, width) if height * width <= most and colours in fit and not _turned(content) else None


def segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment of a JPEG up to its (first) scan; nothing more where the next one is not at its place."""
    at = 2
    while content[at : at + 1] == b"\xff":
        while content[at + 1 : at + 2] == b"\xff":  # fill bytes, as many as they like
            at += 1
        marker, end = content[at + 1 : at + 2], at + 2 + int.from_bytes(content[at + 2 : at + 4])
        if end < at + 4 or end > len(content):
            return
        yield marker[0], at, end
        if marker[0] == SCAN:
            return
        at = end


def _turned(content: bytes) -> bool:
    """Whether the image says that it is not upright, or might say so; Pillow is asked only where it might."""
    marker = None
    for marker, start, end in segments(content):
        if marker == APP1 and TURNED.search(content, start, end):
            try:
                return Image.open(io.BytesIO(content), formats=("JPEG",)).getexif().get(ORIENTATION, 1) in range(2, 9)
            except Exception:  # a dozen kinds of damage
                return True
    return marker != SCAN
