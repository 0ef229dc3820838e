"""`mae data` counts what is there, names what is damaged, and draws what training will see."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mae import config
from mae.commands import data
from mae.data.batch import Batch
from mae.data.sources import open_splits


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes and three kinds, one of them damaged."""
    generator = np.random.default_rng(0)
    for number in range(12):
        kind = ("JPEG", "RGB") if number % 3 else ("PNG", "LA") if number else ("PNG", "L")
        pixels = generator.integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).convert(kind[1]).save(stream, kind[0])
        name = tmp_path / "images" / ("cat" if number < 9 else "dog") / f"{number:02}.{kind[0].lower()}"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(stream.getvalue() if number != 4 else b"no image")
    return tmp_path / "images"


def test_it_shows_what_will_be_trained_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SECONDS", 0.01)
    words = ["configs/data/folder.yaml", f"data.path={folder}", "data.image_size=16", "data.workers=0", "train.batch_size=4"]
    words += ["encoder.name=vit_tiny_patch16_224", "encoder.patch_size=4", "encoder.depth=1", "data.damage=0.5", "data.crop_scale=[0.5,1]"]
    assert data.main([*words, "--out", str(tmp_path / "seen")]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "seen" / "data.json").read_text())
    everything = sum(figures["images"].values())
    assert everything == 12
    seen = figures["images"]["train"]
    assert sum(figures["kinds"].values()) + len(figures["unreadable"]) == everything == figures["looked_at"]
    assert set(figures["kinds"]) <= {"JPEG RGB", "PNG LA", "PNG L"}
    ((split, name, reason),) = figures["unreadable"]  # wherever it fell
    assert name == "cat/04.jpeg"
    assert f"    {split}: {name} cannot be read: {reason}" in shown
    assert "would stop a run" not in shown
    assert sum(figures["classes"].values()) == seen
    assert figures["width"] == [30] * 5
    assert figures["height"] == sorted(figures["height"])
    assert 20 <= figures["height"][0] < figures["height"][-1] <= 31
    assert all(figures["images_per_second"][which] > 0 for which in ("loader", "model"))
    assert f"{seen} train" in shown
    assert "images/s" in shown
    with Image.open(tmp_path / "seen" / "contact_sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
        assert sheet.width > sheet.height


def test_images_that_cannot_be_read_are_not_drawn(folder):
    cfg = config.load(["configs/data/folder.yaml", f"data.path={folder}", "data.image_size=32"])
    train = open_splits(cfg.data).train
    bad = [i for i in range(len(train)) if i in (0, 4, len(train) - 1)]
    for index in bad:
        (train.source.source.root / train.name_of(index)).write_bytes(b"")
    chosen = data._readable(train, 8)
    assert not set(chosen.tolist()) & {
        i for i in range(len(train)) if train.name_of(i) in ("cat/04.jpeg", *(train.name_of(b) for b in bad))
    }
    assert len(np.unique(chosen)) == len(chosen) >= 3


def test_a_whole_batch_is_not_timed_where_it_takes_long(monkeypatch):
    cfg = config.load(["encoder.depth=1", "encoder.embed_dim=32", "train.batch_size=64"])
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    batch = Batch(images, torch.arange(64), torch.zeros(64), torch.arange(64), 0, 0)
    for a_step, an_image, counts in ((1.5, 0.75, [4, 8]), (0.1, 0.01, [4, 8, 16, 32, 64, 64])):
        tried = []

        def timed(act, count, device, seconds=None, *, tried=tried, a_step=a_step, an_image=an_image):
            tried.append(count)
            act(count)
            return count / (a_step + count * an_image)

        monkeypatch.setattr(data, "_timed", timed)
        assert data._model_pace(cfg, batch, torch.device("cpu")) == pytest.approx(64 / (a_step + 64 * an_image))
        assert tried == counts


def test_more_damage_than_a_run_would_bear_is_told_beforehand(folder, capsys):
    for name in ("00.png", "01.jpeg", "02.jpeg"):
        (folder / "cat" / name).write_bytes(b"")
    cfg = config.load(["configs/data/folder.yaml", f"data.path={folder}", "data.image_size=32"])
    assert len(data._seen(cfg, open_splits(cfg.data), 100)["unreadable"]) == 4
    assert "more than data.damage=0.001 of the training images" in capsys.readouterr().out


def test_bad_input_is_one_sentence_and_makes_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, said in ((["nonsense"], "neither a .yaml file"), (["--images", "0"], "whole number"), (["data.nmae=x"], "did you mean")):
        assert data.main(words) == 2
        assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
