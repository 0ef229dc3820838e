"""The fast decoder gives Pillow's pixels to the bit, or leaves the image to Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae.data import jpeg
from mae.data.decode import DamagedImage, decode

pytest.importorskip("simplejpeg")


def encoded(pixels, **how):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", **how)
    return stream.getvalue()


def picture(seed, height, width, channels):
    """Waves and noise, so that neither smooth nor sharp parts are missing."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 90 * np.sin(x[..., None] / generator.uniform(1, 20, channels) + y[..., None] / generator.uniform(1, 20, channels))
    pixels = np.clip(waves + generator.normal(0, generator.uniform(0, 40), (height, width, channels)), 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    own=st.sampled_from([1, 3]),
    quality=st.integers(1, 100),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
)
def test_every_plain_jpeg_has_pillows_pixels(seed, height, width, own, quality, subsampling, progressive):
    content = encoded(picture(seed, height, width, own), quality=quality, subsampling=subsampling, progressive=progressive)
    image = Image.open(io.BytesIO(content))
    found = jpeg.decode(content, channels=3, most=10**6)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))
    grey = jpeg.decode(content, channels=1, most=10**6)
    assert (grey is None) if own == 3 else np.array_equal(grey[..., 0], np.asarray(image))


def test_whatever_is_not_plain_is_left_to_pillow():
    pixels = picture(0, 40, 60, 3)
    plain = encoded(pixels)
    turned, upright = Image.Exif(), Image.Exif()
    turned[jpeg.ORIENTATION], upright[jpeg.ORIENTATION] = 6, 1
    assert jpeg.decode(plain, channels=3, most=2400) is not None
    assert jpeg.decode(encoded(pixels, exif=upright), channels=3, most=2400) is not None
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(stream, "JPEG")
    others = [encoded(pixels, exif=turned), stream.getvalue(), b"", b"\xff\xd8\xff", plain[: len(plain) // 2], b"\x89PNG" + plain]
    assert all(jpeg.decode(other, channels=3, most=2400) is None for other in others)
    assert jpeg.decode(plain, channels=3, most=2399) is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data|Truncated File Read")
def test_no_damaged_byte_of_a_header_raises_anything_but_damage():
    turned = Image.Exif()
    turned[jpeg.ORIENTATION] = 6
    content = encoded(picture(1, 8, 12, 3), exif=turned, dpi=(72, 72))  # with a resolution, Pillow reads EXIF no earlier than we do
    assert decode(content, channels=3, name="x").shape == (12, 8, 3)
    shapes = set()
    for place in range(content.index(b"\xff\xda")):
        for flip in (0x01, 0x40, 0xFF):
            damaged = content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
            try:
                shapes.add(decode(damaged, channels=3, name="x").shape)
            except DamagedImage:
                continue
    assert {(12, 8, 3), (8, 12, 3)} <= shapes  # turned still, and no more


def test_orientation_is_found_behind_fill_bytes_and_rubbish():
    turned = Image.Exif()
    turned[jpeg.ORIENTATION] = 6
    content = encoded(picture(1, 8, 12, 3), exif=turned)
    exif = content.index(b"\xff\xe1")
    for between in (b"\xff", b"\xff\xff\xff", b"\0", b"rubbish"):
        assert decode(content[:exif] + between + content[exif:], channels=3, name="x").shape == (12, 8, 3)
