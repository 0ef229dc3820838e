"""Every kind of image has one conversion, the one that docs/data.md tells; hostile bytes end as one sentence and never as anything else."""

import io
import struct
import warnings
import zlib
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mae.data.decode import MAX_PIXELS, DamagedImage, decode

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}
KINDS = {  # mode: bytes a pixel, containers
    "1": (1, ["PNG", "TIFF"]),
    "L": (1, ["PNG", "TIFF"]),
    "P": (1, ["PNG", "TIFF"]),
    "I;16": (2, ["PNG", "TIFF"]),
    "LA": (2, ["PNG", "TIFF"]),
    "RGB": (3, ["PNG", "TIFF", "WEBP"]),
    "RGBA": (4, ["PNG", "TIFF", "WEBP"]),
    "CMYK": (4, ["TIFF"]),
}
UNDONE = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # by orientation: the transposition that a camera would have stored


def meant(mode, raw, palette):
    """What an image of these bytes shows: (H, W, 3) float, by the table of docs/data.md."""
    x = raw.astype(float)
    if mode == "P":
        return palette[raw[..., 0]].astype(float)
    if mode == "I;16":
        return np.repeat((x[..., :1] + 256 * x[..., 1:]) / 257, 3, axis=2)
    if mode == "CMYK":
        return (255 - x[..., :3]) * (255 - x[..., 3:]) / 255
    if mode in ("LA", "RGBA"):
        alpha = x[..., -1:] / 255
        return np.broadcast_to(x[..., :-1] * alpha + 255 * (1 - alpha), (*x.shape[:2], 3))
    return np.broadcast_to(255 * (x > 127) if mode == "1" else x, (*x.shape[:2], 3))


def stored(mode, raw, palette):
    if mode == "1":
        return Image.fromarray(np.where(raw[..., 0] > 127, 255, 0).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    if mode == "I;16":
        return Image.fromarray(np.ascontiguousarray(raw).view("<u2")[..., 0])
    image = Image.frombytes(mode, raw.shape[1::-1], np.ascontiguousarray(raw).tobytes())
    if mode == "P":
        image.putpalette(palette.ravel().tolist())
    return image


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_each_mode_has_its_conversion_in_any_container_and_orientation(data):
    mode = data.draw(st.sampled_from(sorted(KINDS)))
    values, kinds = KINDS[mode]
    raw = data.draw(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(values))))
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    kind, orientation = data.draw(st.sampled_from(kinds)), data.draw(st.integers(1, 8))
    image, expected = stored(mode, raw, palette), meant(mode, raw, palette)
    if UNDONE[orientation] is not None:
        image = image.transpose(Image.Transpose(UNDONE[orientation]))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif, **LOSSLESS[kind])
    colours = decode(buffer.getvalue(), channels=3, name="x")
    assert colours.dtype == np.uint8
    assert colours.shape == expected.shape
    assert np.abs(colours - expected).max() <= 1
    grey = decode(buffer.getvalue(), channels=1, name="x")
    assert np.abs(grey[..., 0] - expected @ [0.299, 0.587, 0.114]).max() <= 2


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_png(values, colour):
    """A PNG of (H, W, C) uint16, which Pillow does not write; `colour`: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 0), (3, 2), (2, 4), (4, 6)]), st.integers(0, 9))
def test_sixteen_bits_are_scaled_and_never_clipped(kind, seed):
    bands, colour = kind
    values = np.random.default_rng(seed).integers(0, 1 << 16, (4, 5, bands))
    x = values / 257
    alpha = x[..., -1:] / 255 if colour in (4, 6) else 1
    expected = np.broadcast_to((x[..., :-1] if colour in (4, 6) else x) * alpha + 255 * (1 - alpha), (4, 5, 3))
    assert np.abs(decode(deep_png(values, colour), channels=3, name="x") - expected).max() <= 2


def test_a_transparent_palette_entry_is_white_and_an_animation_is_its_first_frame():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 200, 40, 10])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=1)
    assert decode(buffer.getvalue(), channels=3, name="x").min() == 255
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    for kind in ("PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **LOSSLESS[kind])
        assert decode(buffer.getvalue(), channels=3, name="x")[0, 0].tolist() == [255, 0, 0]


PICTURE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def whole(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.sampled_from([b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]),
    st.binary(max_size=60),
)
@example("PNG", b"Exif\0\0", b"no TIFF")
def test_damaged_orientations_leave_the_pixels_as_they_are(kind, start, rest):
    pixels = decode(whole(kind, exif=start + rest), channels=3, name="x")
    assert sorted(pixels.shape[:2]) == [7, 9]  # junk may spell an orientation


def outcome(content):
    """The pixels or the damage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode(content, channels=3, name="some/file.jpg")
        except DamagedImage as error:
            return error


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]), st.data())
def test_damaged_bytes_are_an_image_or_one_sentence(kind, data):
    content = bytearray(whole(kind))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    found = outcome(content)
    if isinstance(found, DamagedImage):
        assert str(found).startswith("some/file.jpg cannot be read: ")
        assert "\n" not in str(found)
    else:
        assert found.dtype == np.uint8
        assert found.shape[2] == 3


def claimed(kind, width, height):
    """A small file whose header claims another size."""
    content = bytearray(whole(kind))
    if kind == "PNG":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    elif kind == "JPEG":
        start = content.index(b"\xff\xc0")
        content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    elif kind == "WEBP":
        frames, buffer = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(2)], io.BytesIO()
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])  # only an animation says its size by itself
        content = bytearray(buffer.getvalue())
        content[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    else:
        for tag, value in ((256, width), (257, height)):
            start = content.index(struct.pack("<HHI", tag, 4, 1))
            content[start + 8 : start + 12] = struct.pack("<I", value)
    return bytes(content)


@pytest.mark.parametrize(
    ("kind", "size"), [*product(["PNG", "JPEG", "TIFF"], [(10_000, 10_000), (65_000, 65_000)]), ("WEBP", (10_000, 10_000))]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_told_by_its_header(kind, size):
    assert size[0] * size[1] > MAX_PIXELS
    with pytest.raises(DamagedImage, match="pixels"):
        decode(claimed(kind, *size), channels=3, name="x")
