"""Arrays of many channels and deep pixels reach the network as they are; their statistics are those of NumPy."""

import io
import pickle
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from mae import config
from mae.commands import statistics as command
from mae.data import arrays, crops
from mae.data.arrays import decode_array
from mae.data.augmentation import KeyedTransform
from mae.data.decode import MAX_PIXELS, DamagedImage
from mae.data.loader import evaluation_batches, train_batches
from mae.data.sources import open_splits
from mae.errors import ConfigError

CPU = torch.device("cpu")


def npy(values, **options):
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def npz(*_, **values):
    stream = io.BytesIO()
    np.savez_compressed(stream, **values)
    return stream.getvalue()


def tiff(values, **options):
    stream = io.BytesIO()
    pages = [Image.fromarray(page) for page in (values if values.ndim == 3 else values[None])]
    pages[0].save(stream, "TIFF", save_all=True, append_images=pages[1:], **options)
    return stream.getvalue()


KINDS = [np.uint8, np.uint16, np.int16, np.float32, np.float64, ">u2", ">f4"]
RANGE = {"min_value": -1e6, "max_value": 1e6, "allow_nan": False}
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(7, 9))
DEEP = st.sampled_from(KINDS).flatmap(lambda kind: hnp.arrays(kind, SHAPES, elements=RANGE if np.dtype(kind).kind == "f" else None))


def meant(values):
    """What the values stand for."""
    return np.float32(values) / np.float32(np.iinfo(values.dtype).max) if values.dtype.kind == "u" else np.float32(values)


@settings(max_examples=60, deadline=None)
@given(values=DEEP, packed=st.booleans(), by_columns=st.booleans())
def test_every_number_type_and_order_of_axes_is_read(values, packed, by_columns):
    channels = values.shape[2]
    stored = np.asfortranarray(values) if by_columns else values
    for given_ in (stored, np.asarray(stored.transpose(2, 0, 1))):
        content = npz(image=given_, label=np.arange(3)) if packed else npy(given_)
        found = decode_array(content, channels=channels, name="x")
        assert found.dtype == np.float32
        assert np.array_equal(found, meant(values))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize(("kind", "pages"), [(np.uint8, 1), (np.uint16, 1), (np.float32, 1), (np.uint16, 5)])
def test_grey_tiffs_keep_their_depth_and_pages_are_channels(kind, pages, compression):
    values = np.random.default_rng(0).integers(0, 256, (pages, 4, 6)).astype(kind) * kind(1 if kind == np.uint8 else 257)
    found = decode_array(tiff(values, compression=compression), channels=pages, name="x")
    assert np.array_equal(found, meant(values).transpose(1, 2, 0))


def test_eight_bit_colours_of_a_tiff_need_no_library():
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    assert np.array_equal(decode_array(stream.getvalue(), channels=3, name="x"), meant(values))


def many_channel_tiff(values):
    """A TIFF of (H, W, C) uint16, written by hand."""
    height, width, channels = values.shape
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, None), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [
        (273, 4, 1, None),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, values.nbytes),
        (284, 3, 1, 1),
        (339, 3, channels, None),
    ]
    body = 8 + 2 + 12 * len(tags) + 4
    bits, kinds, start = body, body + 2 * channels, body + 4 * channels
    fields = b""
    for tag, kind, count, value in tags:
        place = {258: bits, 339: kinds, 273: start}.get(tag, value)
        fields += np.array([tag, kind], "<u2").tobytes() + np.array([count, place], "<u4").tobytes()
    extra = np.full(channels, 16, "<u2").tobytes() + np.ones(channels, "<u2").tobytes()
    return (
        b"II*\0"
        + np.array([8], "<u4").tobytes()
        + np.array([len(tags)], "<u2").tobytes()
        + fields
        + bytes(4)
        + extra
        + values.astype("<u2").tobytes()
    )


def test_many_channels_of_a_tiff_are_read_where_the_library_is_installed():
    pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 1 << 16, (4, 6, 13), np.uint16)
    assert np.array_equal(decode_array(many_channel_tiff(values), channels=13, name="x"), meant(values))
    with pytest.raises(DamagedImage, match=r"4 x 6 x 13 has no 12 channels: set data\.channels=4"):
        decode_array(many_channel_tiff(values), channels=12, name="x")


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ConfigError, match=r"pip install tifffile"):
        decode_array(many_channel_tiff(np.zeros((4, 6, 13), np.uint16)), channels=13, name="x")


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def bomb():
    """An NPZ of a few bytes that claims a thousand million pixels."""
    header, stream = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9999, 99999, 3)})
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header.getvalue())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bytes"),
        (b"\x89PNG\r\n", "no NPY, NPZ or TIFF"),
        (npy(np.zeros((9, 9, 4), np.uint8)), r"9 x 9 x 4 has no 3 channels: set data\.channels=4"),
        (npy(np.zeros((9, 9), np.uint8)), "set data.channels=1"),
        (npy(np.zeros((2, 9, 9, 3), np.uint8)), "no 3 channels"),
        (npy(np.zeros((9, 9, 3), np.uint8))[:-5], "cut short"),
        (npy(np.zeros((0, 9, 3), np.uint8)), "are none"),
        (npy(np.zeros((9, 9, 3), complex)), "no numbers of pixels"),
        (npy(np.full((9, 9, 3), np.nan)), "100.00% of its values are not finite"),
        (npy(np.full((9, 9, 3), 1e300)), "not finite"),
        (npz(a=np.zeros((9, 9, 3)), b=np.zeros(2)), "2 arrays"),
        (npz(image=np.zeros((9, 9, 3), np.uint8))[:60], "zip"),
        (bomb(), f"more than {MAX_PIXELS:,}"),
        (tiff(np.zeros((9, 9), np.uint16))[:40], r"\w"),
        (b"II*\0\xff\xff\xff\xff" + bytes(20), r"\w"),
        (tiff(np.zeros((2, 9, 9), np.uint16)), r"2 x 9 x 9 has no 3 channels: set data\.channels=2"),
    ],
)
def test_what_cannot_be_read_is_named(content, reason):
    with pytest.raises(DamagedImage, match=reason) as caught:
        decode_array(content, channels=3, name="a/b.npy")
    assert "a/b.npy" in str(caught.value)


def test_pickles_are_never_opened(tmp_path):
    evil = np.array([[[Evil(tmp_path / "executed")] * 3]], object)
    for content in (npy(evil, allow_pickle=True), npz(image=evil), pickle.dumps(Evil(tmp_path / "executed"))):
        with pytest.raises(DamagedImage):
            decode_array(content, channels=3, name="x.npy")
    assert not (tmp_path / "executed").exists()


CHANNELS = 5
SIZES = [(20, 24), (16, 16), (30, 17)]


def folder(tmp_path, *, count=12, sizes=SIZES, flat=False):
    """Arrays of several sizes in two classes; the pixels by name."""
    found = {}
    for i in range(count):
        rng = np.random.default_rng(i)
        values = rng.integers(0, 1 << 16, (*sizes[i % len(sizes)], CHANNELS)).astype(np.uint16)
        if flat:
            values[..., 3] = 700
        name = f"{'ab'[i % 2]}/{i}.npy"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(npy(values))
        found[name] = meant(values)
    return found


def configured(path, *words):
    return config.load(["configs/data/arrays.yaml", f"data.path={path}", f"data.channels={CHANNELS}", "data.workers=0", *words])


def computed(tmp_path, path, *words):
    """The file that mae statistics writes for a folder."""
    given_ = ["configs/data/arrays.yaml", f"data.path={path}", f"data.channels={CHANNELS}", "data.workers=0", *words]
    assert command.main([*given_, "--out", str(tmp_path / "s.yaml")]) == 0
    return str(tmp_path / "s.yaml")


@pytest.mark.parametrize("sizes", [SIZES, [(20, 24)]], ids=["several_sizes", "one_size"])
def test_batches_are_normalised_crops_from_any_memory(tmp_path, sizes):
    pixels = folder(tmp_path / "d", sizes=sizes)
    words = [computed(tmp_path, tmp_path / "d"), "data.image_size=16", "encoder.patch_size=4", "train.batch_size=6"]
    streamed = configured(tmp_path / "d", *words)
    splits = open_splits(streamed.data)
    mean, std = np.float32(streamed.data.mean), np.float32(streamed.data.std)
    first = next(iter(evaluation_batches(splits.test, streamed, batch_size=64, device=CPU)))
    assert first.images.dtype == torch.float32
    for image, index in zip(first.images, first.ids, strict=True):
        whole = (pixels[splits.test.name_of(int(index))] - mean) / std
        np.testing.assert_allclose(image.permute(1, 2, 0), crops.central(whole, (16, 16), 1.0), atol=2e-5)
    one, other = (
        [
            batch[0]
            for batch in islice(
                train_batches(splits.train, configured(tmp_path / "d", *words, f"data.cache={kind}"), first_step=0, device=CPU), 3
            )
        ]
        for kind in ("none", "ram")
    )
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert a.images.shape == (6, CHANNELS, 16, 16)
        if len(sizes) == 1:  # several are brought to one first
            torch.testing.assert_close(a.images, b.images, atol=1e-3, rtol=0)


@pytest.mark.parametrize("decode", ["auto", "gpu"])
def test_a_jpeg_among_arrays_is_damaged_and_goes_no_way_of_its_own(tmp_path, decode):
    for i in range(6):
        (tmp_path / f"{i}.npy").write_bytes(npy(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)))
    for i in range(2):
        Image.new("RGB", (40, 40)).save(tmp_path / f"jpeg{i}.tif", "JPEG")
    words = [
        "data.channels=3",
        "data.mean=[0.5,0.5,0.5]",
        "data.std=[1,1,1]",
        "data.image_size=32",
        "train.batch_size=8",
        f"data.decode={decode}",
    ]
    c = configured(tmp_path, *words, "data.damage=1")
    steps = list(islice(train_batches(open_splits(c.data).train, c, first_step=0, device=CPU), 3))
    assert all(batch.images.dtype == torch.float32 for (batch,) in steps)
    assert sum(batch.replaced for (batch,) in steps) > 0


def test_fine_tuning_crops_what_timm_cannot_hold(tmp_path):
    pixels = folder(tmp_path / "d")
    data = configured(tmp_path / "d", computed(tmp_path, tmp_path / "d")).data
    view = KeyedTransform(data, (16, 16), erase=1.0)
    image = pixels["a/0.npy"]
    assert view(image, 1).shape == (CHANNELS, 16, 16)
    assert torch.equal(view(image, 1), view(image, 1))
    assert not torch.equal(view(image, 1), view(image, 2))
    with pytest.raises(ConfigError, match=r"protocol\.auto_augment=none"):
        KeyedTransform(data, (16, 16), auto_augment="rand-m9-mstd0.5-inc1")


def test_wrong_channels_are_answered_with_the_right_ones(tmp_path, capsys):
    folder(tmp_path / "d")
    assert (
        command.main(["configs/data/arrays.yaml", f"data.path={tmp_path / 'd'}", "data.channels=4", "--out", str(tmp_path / "s.yaml")]) == 2
    )
    assert f"set data.channels={CHANNELS}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="above 0 in every channel"):
        configured(tmp_path / "d", f"data.mean={[0.0] * CHANNELS}", f"data.std={[0.0] * CHANNELS}")
    assert arrays.ARRAYS.extensions == (".npy", ".npz", ".tif", ".tiff")
