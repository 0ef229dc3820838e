"""Any image file becomes the pixels it means, and what cannot be read is named."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mae.data import jpeg
from mae.data.decode import DamagedImage, decode

RED, HALF = (200, 40, 10), 128


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values, claimed=None):
    """A 16-bit grey PNG, written by hand: values (H, W) in 0..65535; `claimed`: the (H, W) that its header tells instead."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = claimed or values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def plain(mode, colour):
    return Image.new(mode, (8, 6), colour)


def palette(transparent=False):
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, "PNG", **({"transparency": 1} if transparent else {}))


@pytest.mark.parametrize(
    ("content", "expected", "tolerance"),
    [
        (encoded(plain("RGB", RED), "PNG"), RED, 0),
        (encoded(plain("RGB", RED), "JPEG", quality=95), RED, 3),
        (encoded(plain("RGB", RED), "WEBP", lossless=True), RED, 0),
        (encoded(plain("RGB", RED), "TIFF"), RED, 0),
        (encoded(plain("L", 90), "PNG"), (90, 90, 90), 0),
        (encoded(plain("1", 1), "PNG"), (255, 255, 255), 0),
        (palette(), RED, 0),
        (palette(transparent=True), (255, 255, 255), 0),
        (encoded(plain("RGBA", (*RED, 0)), "PNG"), (255, 255, 255), 0),
        (encoded(plain("RGBA", (*RED, HALF)), "PNG"), tuple(round((c * HALF + 255 * (255 - HALF)) / 255) for c in RED), 1),
        (encoded(plain("LA", (0, HALF)), "PNG"), (127, 127, 127), 1),
        (encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0), 3),
        (png16(np.full((6, 8), 30000, np.uint16)), (round(30000 / 257),) * 3, 0),
        (encoded(Image.fromarray(np.full((6, 8), 65535, np.uint16)), "TIFF"), (255, 255, 255), 0),
    ],
)
def test_every_kind_of_image_becomes_eight_bit_rgb(content, expected, tolerance):
    pixels = decode(content, channels=3, name="x")
    assert pixels.shape == (6, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_grey_is_luma_and_sixteen_bits_keep_their_order():
    assert decode(encoded(plain("RGB", (255, 0, 0)), "PNG"), channels=1, name="x").tolist() == [[[76]] * 8] * 6
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    assert np.array_equal(decode(png16(ramp), channels=1, name="x")[..., 0], np.rint(ramp / 257).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encoded(stored, "PNG", exif=exif), channels=3, name="x"), upright)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(9))  # 0 and 1: upright
def test_jpegs_are_turned_as_pillow_turns_them_in_either_byte_order(orientation, order):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    notes = start + struct.pack(order + "HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    content = encoded(picture, "JPEG", exif=b"Exif\0\0" + notes)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode(content, channels=3, name="x"), np.asarray(upright))
    assert jpeg.decode(content, channels=3, most=10**6) is None or orientation < 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bytes"),
        (b"not an image at all", "no JPEG"),
        (encoded(plain("RGB", RED), "JPEG")[:-40], "(?i)truncated"),
        (encoded(plain("RGB", RED), "PNG")[:40], "header"),
        (encoded(plain("RGB", RED), "PPM"), "no JPEG"),
        (encoded(plain("RGB", RED), "BMP"), "no JPEG"),
        (encoded(plain("RGB", RED), "GIF"), "no JPEG"),
        (encoded(plain("F", 0.5), "TIFF"), "32-bit"),
        (png16(np.zeros((1, 1), np.uint16), claimed=(60000, 60000)), "pixels"),
        (encoded(Image.new("1", (12000, 9000)), "PNG"), "pixels are more than"),
    ],
    ids=["empty", "text", "cut_jpeg", "cut_png", "ppm", "bmp", "gif", "float", "bomb", "large"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_cannot_be_read_is_named(content, reason):
    with pytest.raises(DamagedImage, match=reason) as caught:
        decode(content, channels=3, name="some/file.jpg")
    assert caught.value.name == "some/file.jpg"
    assert "some/file.jpg" in str(caught.value)
