"""Any folder becomes the splits it means, and what cannot be used is named."""

import os

import numpy as np
import pytest
from PIL import Image

from mae import config
from mae.data import digits
from mae.data.decode import DamagedImage
from mae.data.sources import Subset, open_splits
from mae.errors import ConfigError


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


def test_digits_are_scikit_learns_whether_it_is_imported_for_them_or_not(monkeypatch):
    read = digits.Digits(1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # its file is not where it was
    imported = digits.Digits(1)
    assert read.fingerprint == imported.fingerprint
    assert np.array_equal(read.images, imported.images)
    assert np.array_equal(read.labels, imported.labels)


def test_a_subset_of_a_subset_names_the_same_images(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(9)))
    train = opened(tmp_path).train
    part = Subset(train, np.array([3, 1]))
    assert [part.name_of(0), part.name_of(1)] == [train.name_of(3), train.name_of(1)]
    assert part.fingerprint != Subset(train, np.array([1, 3])).fingerprint
