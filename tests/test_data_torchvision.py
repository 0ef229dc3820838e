"""The sets that torchvision knows: read where they lie, brought where they do not, their pickles opened by checksum alone."""

import dataclasses
import gzip
import hashlib
import pickle
import struct
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from mae import config
from mae.data.sources import open_splits
from mae.errors import ConfigError

RNG = np.random.default_rng(0)
NOWHERE = "http://127.0.0.1:9/"  # the discard port: refused at once


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in (datasets.CIFAR10, datasets.STL10):
        monkeypatch.setattr(kind, "url", NOWHERE + kind.filename)
    monkeypatch.setattr(datasets.CIFAR100, "url", NOWHERE + datasets.CIFAR100.filename)
    for kind in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(kind, "mirrors", [NOWHERE])


@cache
def of_file(name):
    return config.load([f"configs/data/{name}.yaml"]).data


def opened(name, path=None, **changed):
    return open_splits(dataclasses.replace(of_file(name), path=None if path is None else str(path), **changed))


def md5(content):
    return hashlib.md5(content).hexdigest()


def cifar(root, monkeypatch):
    """Small files in CIFAR-10's format, whose checksums take the place of the published ones; the pixels by split."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = {name: RNG.integers(0, 256, (4, 32, 32, 3), np.uint8) for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list}
    sums = {}
    for name, images in pixels.items():
        entry = {"data": images.transpose(0, 3, 1, 2).reshape(4, -1), "labels": [0, 1, 2, 9]}
        sums[name] = md5(content := pickle.dumps(entry))
        (folder / name).write_bytes(content)
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(datasets.CIFAR10, split, [[name, sums[name]] for name, _ in getattr(datasets.CIFAR10, split)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(meta)})
    return pixels


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar_is_read_where_it_lies(tmp_path, monkeypatch, inside):
    pixels = cifar(tmp_path / "d", monkeypatch)
    splits = opened("cifar10", tmp_path / "d" / inside)
    assert [len(part) for part in splits] == [18, 2, 4]
    assert splits.train.classes == tuple("abcdefghij")
    assert splits.test.labels.tolist() == [0, 1, 2, 9]
    assert all(np.array_equal(splits.test.read(i), pixels["test_batch"][i]) for i in range(4))
    assert opened("cifar10", tmp_path / "d", channels=1, mean=[0.5], std=[0.2]).test.read(0).shape == (32, 32, 1)


def test_an_archive_brought_by_hand_is_unpacked_and_the_network_left_alone(tmp_path, monkeypatch):
    cifar(tmp_path / "made", monkeypatch)
    there = tmp_path / "there"
    there.mkdir()
    with tarfile.open(there / datasets.CIFAR10.filename, "w:gz") as archive:
        archive.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5((there / datasets.CIFAR10.filename).read_bytes()))
    assert len(opened("cifar10", there).test) == 4


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_of_other_bytes_is_never_opened(tmp_path, monkeypatch):
    cifar(tmp_path, monkeypatch)
    for name in ("test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
        with pytest.raises(ConfigError, match="not whole"):
            opened("cifar10", tmp_path)
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "stl10", "stl10_unlabeled"])
def test_what_is_neither_here_nor_there_is_answered_in_one_sentence(tmp_path, name):
    with pytest.raises(ConfigError, match=r"Connection refused\): connect this machine, or put .* into ") as caught:
        opened(name, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cache/mae/torchvision"):
        opened(name)
    with pytest.raises(ConfigError, match="does not exist"):
        opened(name, tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(("name", "folder", "classes"), [("mnist", "MNIST", "7 - seven"), ("fashion_mnist", "FashionMNIST", "Sneaker")])
def test_mnist_is_read_from_its_raw_files_or_their_archives(tmp_path, name, folder, classes):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = {split: RNG.integers(0, 256, (10, 28, 28), np.uint8) for split in ("train", "t10k")}
    for split, pixels in images.items():
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 10, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 10) + bytes(range(10)))
    splits = opened(name, tmp_path)
    assert [len(part) for part in splits] == [9, 1, 10]
    assert splits.train.classes[7] == classes
    assert np.array_equal(splits.test.read(3)[..., 0], images["t10k"][3])
    assert opened(name, tmp_path, channels=3, mean=[0, 0, 0], std=[1, 1, 1]).test.read(0).shape == (28, 28, 3)
    (raw / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 10, 28, 28) + images["t10k"].tobytes()[:99])
    with pytest.raises(ConfigError, match="damaged"):
        opened(name, tmp_path)
    (raw / "t10k-labels-idx1-ubyte").rename(raw / "x")
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other bytes than the published ones"))
    with pytest.raises(ConfigError, match="not whole"):
        opened(name, tmp_path)


def test_stl10_has_labelled_images_and_others(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {"train": 6, "test": 5, "unlabeled": 9}
    sums = {}
    for split, count in images.items():
        images[split] = RNG.integers(0, 256, (count, 96, 96, 3), np.uint8)
        (folder / f"{split}_X.bin").write_bytes(images[split].transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(1 + i for i in range(count)))
    (folder / "class_names.txt").write_text(
        "\n".join(["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"])
    )
    for file in folder.glob("*.bin"):
        sums[file.name] = md5(file.read_bytes())
    for split in ("train_list", "test_list"):
        monkeypatch.setattr(datasets.STL10, split, [[name, sums[name]] for name, _ in getattr(datasets.STL10, split)])
    labelled = opened("stl10", tmp_path)
    assert [len(part) for part in labelled] == [5, 1, 5]
    assert labelled.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert labelled.test.classes[9] == "truck"
    assert np.array_equal(labelled.test.read(2), images["test"][2])
    bare = opened("stl10_unlabeled", tmp_path, validation=0.2)
    assert [len(part) for part in bare] == [7, 2, 5]
    assert bare.train.labels is None
    assert bare.test.classes is None
    assert bare.test.read(1).tobytes() == images["test"][1].tobytes()
    crossed = pickle.dumps(bare.train)
    assert len(crossed) < 10_000  # the mapped pixels stay where they are
    assert np.array_equal(pickle.loads(crossed).read(0), bare.train.read(0))
    assert len({labelled.test.fingerprint, bare.test.fingerprint}) == 2
