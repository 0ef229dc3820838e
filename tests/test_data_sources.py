"""Any image file becomes the pixels it means, any folder the splits it means, and what cannot be used is named."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mae import config
from mae.data import jpeg
from mae.data.decode import DamagedImage, decode
from mae.data.sources import Subset, open_splits
from mae.errors import ConfigError

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


def opened(path, *words):
    return open_splits(config.load(["data.name=folder", f"data.path={path}", "data.image_size=32", *words]).data)


def write(root, *paths):
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 8 + i % 3), (i % 256, 0, 0)).save(root / path, "PNG")


def names(source):
    return {source.name_of(i) for i in range(len(source))}


def test_class_folders_are_labels_and_splits_cover_every_image_once(tmp_path):
    paths = [f"{c}/{i}.JPEG" for c in ("wolf", "cat", "dog") for i in range(20)]  # PNG inside: the content decides
    write(tmp_path, *paths)
    splits = opened(tmp_path, "data.validation=0.25")
    assert splits.train.classes == splits.test.classes == ("cat", "dog", "wolf")
    assert [len(part) for part in splits] == [36, 12, 12]
    assert set.union(*(names(part) for part in splits)) == set(paths)
    for part in splits:
        assert [part.classes[label] for label in part.labels] == [part.name_of(i).split("/")[0] for i in range(len(part))]
    assert splits.train.read(0).shape in {(8, 10, 3), (9, 10, 3), (10, 10, 3)}


def test_splits_depend_on_the_seed_and_not_on_where_the_folder_lies(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, *(f"{i}.png" for i in range(40)))
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert [names(part) for part in a] == [names(part) for part in b]
    assert [part.fingerprint for part in a] == [part.fingerprint for part in b]
    other = opened(tmp_path / "a", "data.split_seed=1")
    assert names(a.test) != names(other.test)
    assert names(a.validation) != names(other.validation)
    (tmp_path / "b" / "7.png").write_bytes(b"longer")
    assert any(x.fingerprint != y.fingerprint for x, y in zip(a, opened(tmp_path / "b"), strict=True))


@pytest.mark.parametrize(
    "paths",
    [
        ["a.png", "b.png", "c.png", "d.png"],
        ["one/a.png", "one/b.png", "one/c.png", "one/d.png"],
        ["one/a.png", "two/b.png", "c.png", "d.png"],
        ["2023/05/a.png", "2023/06/b.png", "2024/05/c.png", "2024/05/d.png"],
    ],
    ids=["flat", "one_folder", "mixed", "deep"],
)
def test_folders_that_do_not_say_classes_give_no_labels(tmp_path, paths):
    write(tmp_path, *paths, ".hidden/e.png", "one/._a.png")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "loop").symlink_to(tmp_path)
    splits = opened(tmp_path)
    assert splits.train.classes is None
    assert splits.train.labels is None
    assert set.union(*(names(part) for part in splits)) == set(paths)


def test_files_of_any_name_are_images_and_class_names_are_text(tmp_path):
    odd = [
        "with space.png",
        "new\nline.PNG",
        "日本.JpEg",
        "tab\t.webp",
        "-dash.png",
        "a.b.c.jpg",
        "{0..3}.png",
        "%41.png",
        os.fsdecode(b"caf\xe9.png"),
    ]
    paths = [f"{c}/{name}" for c in ("a", "ü b") for name in odd]
    write(tmp_path, *paths)
    (tmp_path / "a" / "no_ending").write_bytes((tmp_path / paths[0]).read_bytes())
    splits = opened(tmp_path)
    assert set.union(*(names(part) for part in splits)) == set(paths)
    assert all(part.read(i).shape[2] == 3 for part in splits for i in range(len(part)))
    (tmp_path / "a").rename(tmp_path / os.fsdecode(b"\xe9"))
    with pytest.raises(ConfigError, match=r"the class b'\\xe9' .* rename it"):
        opened(tmp_path)
    (tmp_path / "list.txt").write_bytes(
        b"".join(os.fsencode(f"ü b/{name}\t") + b"\xe9%d\n" % i for i, name in enumerate(odd) if "\n" not in name and "\t" not in name)
    )
    with pytest.raises(ConfigError, match=r"the class b'\\xe90'"):
        opened(tmp_path / "list.txt")


def test_links_to_nowhere_are_damaged_images_and_pipes_are_none(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(4)))
    before = [part.fingerprint for part in opened(tmp_path)]
    os.mkfifo(tmp_path / "0pipe.png")
    assert [part.fingerprint for part in opened(tmp_path)] == before  # and nobody waits for what it may give
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "linked.png").symlink_to("0.png")
    source = opened(tmp_path).train.source.source
    assert names(source) == {"0.png", "1.png", "2.png", "3.png", "gone.png", "self.png", "linked.png"}
    for index in range(len(source)):
        if source.name_of(index) in ("gone.png", "self.png"):
            with pytest.raises(DamagedImage, match=source.name_of(index)):
                source.read(index)
        else:
            assert source.read(index).shape[2] == 3


def test_of_several_links_to_a_folder_the_first_by_name_is_followed(tmp_path):
    write(tmp_path, *(f"{middle}/{i}.png" for middle in ("c", "m") for i in range(4)))
    for link, target in (("z", "m"), ("b", "m"), ("k", "c"), ("d", "c")):
        (tmp_path / link).symlink_to(target)
    assert opened(tmp_path).train.classes == ("b", "c")


def test_train_and_val_folders_are_the_splits(tmp_path):
    train = [f"train/{c}/{i}.png" for c in "ab" for i in range(10)]
    write(tmp_path, *train, "val/b/1.png", "val/b/2.png", "test/1.png", "test/2.png")  # ImageNet's test has no classes
    splits = opened(tmp_path)
    assert names(splits.test) == {"b/1.png", "b/2.png"}
    assert splits.test.labels.tolist() == [1, 1]
    assert (len(splits.train), len(splits.validation)) == (18, 2)
    write(tmp_path, "test/a/1.png")
    for name in ("1", "2"):
        (tmp_path / f"test/{name}.png").unlink()
    splits = opened(tmp_path)
    assert [len(part) for part in splits] == [20, 2, 1]
    write(tmp_path, "val/c/1.png")
    with pytest.raises(ConfigError, match="is no class of"):
        opened(tmp_path)


def test_held_out_defects_beside_good_training_images_are_labelled(tmp_path):
    write(tmp_path, *(f"train/good/{i}.png" for i in range(10)), "test/good/1.png", "test/hole/1.png", "ground_truth/hole/1_mask.png")
    splits = opened(tmp_path)
    assert splits.train.labels is None  # one class says nothing: classifiers are told that there are no labels
    assert [len(part) for part in splits] == [9, 1, 2]
    assert splits.test.classes == ("good", "hole")
    assert splits.test.labels.tolist() == [0, 1]
    (tmp_path / "test/good/1.png").unlink()
    assert opened(tmp_path).test.labels is None


def test_a_class_called_train_is_a_class(tmp_path):
    write(tmp_path, *(f"{c}/{i}.png" for c in ("bus", "train") for i in range(3)))
    assert opened(tmp_path).train.classes == ("bus", "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "does not exist"),
        (lambda root: root, "jpeg"),
        (lambda root: (root / "x.png").write_bytes(b"x") and root / "x.png", "is a file"),
        (lambda root: [(root / f"{i}.png").write_bytes(b"x") for i in range(5)] and root, "can be read"),
        (lambda root: write(root, "a.png", "b.png") or root, "at least 3"),
    ],
    ids=["missing", "empty", "file", "unreadable", "too_few"],
)
def test_a_wrong_path_is_answered_in_one_sentence(tmp_path, make, message):
    with pytest.raises(ConfigError, match=message):
        opened(make(tmp_path))


def test_settings_that_mean_nothing_are_refused(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(5)))
    for words, message in (
        (["data.resize=0.9"], "below 1"),
        (["data.channels=4", "data.mean=[0,0,0,0]", "data.std=[1,1,1,1]"], "1 .grey. or 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(tmp_path, *words)
    with pytest.raises(ConfigError, match=r"configs/data/folder.yaml"):
        open_splits(config.load([f"data.path={tmp_path}"]).data)


def test_digits_are_split_by_class_and_their_statistics_are_those_of_the_config():
    data = config.load([]).data
    splits = open_splits(data)
    assert len(splits.test) == 599
    assert len(splits.train) + len(splits.validation) == 1198
    assert len(splits.validation) == 120
    shares = np.bincount(splits.test.labels) / np.bincount(np.concatenate([part.labels for part in splits]))
    assert np.abs(shares - 1 / 3).max() < 0.01
    images = np.stack([splits.train.read(i) for i in range(len(splits.train))]) / 255
    assert images.shape == (1078, 8, 8, 1)
    np.testing.assert_allclose([images.mean(), images.std()], [*data.mean, *data.std], atol=5e-4)
    assert set(np.unique(images * 255)) == {(v * 255 + 8) // 16 for v in range(17)}


def test_a_subset_of_a_subset_names_the_same_images(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(9)))
    train = opened(tmp_path).train
    part = Subset(train, np.array([3, 1]))
    assert [part.name_of(0), part.name_of(1)] == [train.name_of(3), train.name_of(1)]
    assert part.fingerprint != Subset(train, np.array([1, 3])).fingerprint
