"""An image of any source as a file that goes into a shard: its own bytes where nothing has to change."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae.data.decode import decode
from mae.data.sources import Source, file_of
from mae.errors import ConfigError

SIGNATURES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp"))
LANCZOS = Image.Resampling.LANCZOS


class Encoded(NamedTuple):
    """An image as it goes into a shard."""

    extension: str  # jpg | png | webp
    content: bytes
    how: str  # untouched | resized | converted


class Encoder:
    """Callable: position in a source -> Encoded. Picklable, for worker processes."""

    def __init__(self, source: Source, *, resize: int | None, quality: int) -> None:
        """`resize`: pixels that the shorter side is scaled down to, None = as it is; `quality`: of JPEG, 1 to 100."""
        self.source, self.resize, self.quality = source, resize, quality

    def __call__(self, index: int) -> Encoded:
        """Decodes the image, so that nothing damaged gets into a shard. Raises DamagedImage.

        The file is kept byte for byte if it is a JPEG, PNG or WebP and not to be scaled down. What is scaled becomes a JPEG of 8-bit
        RGB or grey pixels, upright, by Pillow's Lanczos filter; what is not but needs another format becomes a PNG of the same pixels.
        """
        content, pixels = _opened(self.source, index)
        side = self.resize if self.resize is not None and min(pixels.shape[:2]) > self.resize else None
        extension = _extension(content)
        if side is None and extension is not None:
            return Encoded(extension, content, "untouched")
        grey = (pixels == pixels[..., :1]).all()
        picture = Image.fromarray(pixels[..., 0] if grey else pixels)
        if side is None:
            return Encoded("png", _saved(picture, "PNG"), "converted")
        scale = side / min(picture.size)
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        return Encoded("jpg", _saved(picture.resize(size, LANCZOS), "JPEG", quality=self.quality), "resized")


def _opened(source: Source, index: int) -> tuple[bytes, np.ndarray]:
    """(the file's bytes, b"" where the source has none; its pixels (H, W, 1 or 3) uint8)."""
    content = file_of(source, index)
    if content is not None:
        return content, decode(content, channels=3, name=source.name_of(index))
    pixels = source.read(index)
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
        raise ConfigError(f"{source.name_of(index)} has {pixels.shape[2]} channels of {pixels.dtype}: shards hold 8-bit grey or RGB images")
    return b"", pixels


def _extension(content: bytes) -> str | None:
    """The format that the bytes, not a name, say."""
    found = next((extension for start, extension in SIGNATURES if content.startswith(start)), None)
    return None if found == "webp" and content[8:12] != b"WEBP" else found


def _saved(picture: Image.Image, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()
