"""What the `datasets` library finds is read as from anywhere else; without the library, or without a network, one sentence."""

import io
import pickle
import sys

import pytest
from PIL import Image

from mae import config
from mae.data.decode import DamagedImage
from mae.data.sources import open_splits
from mae.errors import ConfigError


def opened(path, *words):
    given = [f"data.path={path}"] if path else []
    return open_splits(config.load(["configs/data/hf.yaml", "data.image_size=32", *given, *words]).data)


def test_without_the_library_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install datasets"):
        opened("some/name")
    for path, message in ((None, "data.path is missing"), ("https://huggingface.co/datasets/x", "no URL")):
        with pytest.raises(ConfigError, match=message):
            opened(path)


def png(value, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (6, 5), value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def library(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    found = pytest.importorskip("datasets", reason="pip install datasets")
    found.disable_progress_bars()
    return found


def rows(library, values, labels, names=("cat", "dog")):
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=list(names))})
    return library.Dataset.from_dict({"image": [{"bytes": v, "path": None} for v in values], "label": labels}, features=features)


def test_saved_arrow_is_read_with_its_splits_and_labels(library, tmp_path):
    parts = {
        "train": rows(library, [png((v, 0, 0)) for v in range(20)], [v % 2 for v in range(20)]),
        "validation": rows(library, [png((v, 1, 0)) for v in range(4)], [0, 1, 1, 0]),
        "test": rows(library, [png((v, 2, 0)) for v in range(5)], [-1] * 5),
    }
    library.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    splits = opened(tmp_path / "saved")
    assert [len(part) for part in splits] == [18, 2, 4]  # the test split hides its labels
    assert splits.train.classes == ("cat", "dog")
    assert splits.test.labels.tolist() == [0, 1, 1, 0]
    assert [splits.test.read(i)[0, 0].tolist() for i in range(4)] == [[v, 1, 0] for v in range(4)]
    crossed = pickle.loads(pickle.dumps(splits.train))
    assert crossed.read(3).tolist() == splits.train.read(3).tolist()
    assert opened(tmp_path / "saved").train.fingerprint == splits.train.fingerprint


def test_odd_images_and_damage_are_those_of_every_source(library, tmp_path):
    half = png((0, 0, 0, 128), "RGBA")
    library.DatasetDict(train=rows(library, [half, b"not an image", *[png((9, 9, 9))] * 8], [0] * 5 + [1] * 5)).save_to_disk(
        str(tmp_path / "s")
    )
    train = opened(tmp_path / "s").train
    source = train.source.source
    assert source.read(0)[0, 0].tolist() == [127] * 3
    with pytest.raises(DamagedImage, match="train row 1"):
        source.read(1)
    library.DatasetDict(train=rows(library, [half] * 4, [0, 1, -1, 1])).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(ConfigError, match="train row 2 has no label"):
        opened(tmp_path / "t")
    library.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "u"))
    with pytest.raises(ConfigError, match="no column of images, only text"):
        opened(tmp_path / "u")


def test_folders_of_images_and_of_parquet_files_are_read(library, tmp_path):
    for i in range(12):
        file = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png((i, 0, 0)))
    splits = opened(tmp_path / "images")
    assert sum(len(part) for part in splits) == 12
    assert splits.train.classes == ("cat", "dog")
    assert all(part.read(i)[0, 0, 0] % 2 == part.labels[i] for part in splits for i in range(len(part)))
    rows(library, [png((v, 0, 0)) for v in range(10)], [v % 2 for v in range(10)]).to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    assert sorted(int(p.read(i)[0, 0, 0]) for p in opened(tmp_path / "parquet") for i in range(len(p))) == [*range(10)]


def test_a_name_that_cannot_be_brought_is_answered_in_one_sentence(library):
    with pytest.raises(
        ConfigError, match=r"cannot be opened by the library `datasets` \(.*\): check the name and the connection"
    ) as caught:
        opened("nobody/nothing")
    assert "\n" not in str(caught.value)
