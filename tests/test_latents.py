"""`mae latents`: what it writes is what the model makes, and nothing is made where it refuses."""

import json

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import mae
from mae.__main__ import TOOLS
from mae.commands import export, latents
from mae.commands.latents import keys_of
from mae.data.batch import normalise
from mae.training import checkpoint
from mae.training.run import RunFolder

WORDS = ["data.name=folder", "data.image_size=16", "data.workers=0", "data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]"]
WORDS += ["data.resize=1", "encoder.name=conv", "encoder.patch_size=4", "encoder.embed_dim=16", "train.device=cpu", "train.steps=1"]


def make_run(folder, *words):
    """A run as training leaves it, of an untrained model."""
    words = [*words, *WORDS]
    method = mae.create(words)
    if hasattr(method, "moments"):
        method.moments.copy_(torch.tensor([0.1, 4.0]))
    RunFolder(folder).create(mae.config.load(words), {})
    weights = {f"model.{name}": value for name, value in method.state_dict().items()}
    checkpoint.save(RunFolder(folder).checkpoints, 1, weights, {}, facts={}, keep=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "photos-kl_ae", "configs/methods/kl_ae.yaml")


def make_photos(root, names, damaged=()):
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name)
    for name in damaged:
        (root / name).write_bytes(b"no image")
    return root


def read(folder, pattern="latents-*.tar"):
    """All samples in the shards, by webdataset's own reader."""
    shards = [str(path) for path in sorted(folder.glob(pattern))]
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode())


def test_latents_decode_to_the_models_reconstructions(run, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    names = [f"{animal}/{i}.v{i}.png" for animal in ("cat", "dog") for i in range(3)]
    photos = make_photos(tmp_path / "photos", names)
    target = tmp_path / "made" / "latents"
    assert latents.main([str(run), str(photos), str(target)]) == 0

    samples, index = read(target), json.loads((target / "index.json").read_text())
    assert [s["__key__"] for s in samples] == [name.removesuffix(".png").replace(".v", "_v") for name in names]
    assert [s["cls"] for s in samples] == [0, 0, 0, 1, 1, 1]
    method = mae.load(run)
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(photos / name)) for name in names])).permute(0, 3, 1, 2)
    images = normalise(pixels, mae.config.load(WORDS).data)
    made = method.decode_latents(torch.from_numpy(np.stack([s["npy"] for s in samples])))
    torch.testing.assert_close(made, method.reconstruct(images).detach(), rtol=1e-4, atol=1e-4)

    assert index["run"] == "photos-kl_ae"
    assert index["scale"] == pytest.approx(float(method.scale_factor))
    assert (index["shape"], index["count"], index["classes"]) == ([4, 4, 4], 6, ["cat", "dog"])
    assert index["splits"] == {"latents": {"count": 6, "shards": [f"latents-00000{i}.tar" for i in range(3)]}}
    assert [p.name for p in target.parent.iterdir()] == ["latents"]


def test_splits_on_the_disk_stay_splits_and_shards_are_read_too(run, tmp_path):
    names = [f"{split}/{animal}/{i}.png" for split, n in (("train", 2), ("test", 1)) for animal in "ab" for i in range(n)]
    photos = make_photos(tmp_path / "photos", names)
    assert latents.main([str(run), str(photos), str(tmp_path / "latents")]) == 0
    assert [s["__key__"] for s in read(tmp_path / "latents", "t*.tar")] == ["a/0", "b/0", "a/0", "a/1", "b/0", "b/1"]

    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(str(tmp_path / "shards" / "some-000000.tar")) as writer:
        for name in names:
            writer.write({"__key__": name.removesuffix(".png"), "png": (photos / name).read_bytes()})
    assert latents.main([str(run), str(tmp_path / "shards"), str(tmp_path / "again")]) == 0
    again = {s["__key__"]: s for s in read(tmp_path / "again")}
    assert set(again) == {name.removesuffix(".png") for name in names}
    assert "cls" not in again["train/a/0"]
    twin = next(s for s in read(tmp_path / "latents", "train-*.tar") if s["__key__"] == "a/1")
    np.testing.assert_array_equal(again["train/a/1"]["npy"], twin["npy"])


def test_damaged_images_are_left_out_by_name(run, tmp_path):
    photos = make_photos(tmp_path / "photos", [f"{i}.png" for i in range(5)], damaged=["3.png"])
    assert latents.main([str(run), str(photos), str(tmp_path / "latents")]) == 0
    assert [s["__key__"] for s in read(tmp_path / "latents")] == ["0", "1", "2", "4"]
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    assert (index["left_out"], index["count"]) == (["3.png"], 4)


def test_any_method_with_a_code_at_every_place_will_do(tmp_path):
    token = make_run(tmp_path / "token", "configs/methods/ae.yaml", "method.bottleneck=token", "method.bottleneck_size=3")
    photos = make_photos(tmp_path / "photos", [f"{i}.png" for i in range(4)])
    assert latents.main([str(token), str(photos), str(tmp_path / "latents")]) == 0
    codes = np.stack([s["npy"] for s in read(tmp_path / "latents")])
    assert codes.shape == (4, 3, 4, 4)
    assert codes.std() == pytest.approx(1, rel=0.02)


def test_what_cannot_be_done_is_refused_before_anything_is_made(run, tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", [f"{i}.png" for i in range(4)])
    one_code = make_run(tmp_path / "one_code", "configs/methods/ae.yaml", "method.bottleneck_size=3")
    empty, taken, target = tmp_path / "empty", tmp_path / "taken", tmp_path / "latents"
    empty.mkdir()
    taken.mkdir()
    for words, answer in (
        ([run, photos], "RUN SRC DST"),
        ([tmp_path / "no", photos, target], "there is no"),
        ([photos, photos, target], "no run folder"),
        ([run, tmp_path / "no", target], "no folder"),
        ([run, empty, target], "no images"),
        ([run, photos, taken], "exists already"),
        ([run, photos, photos / "latents"], "elsewhere"),
        ([run, photos, target, "method.kl_weight=1"], "the run decides"),
        ([one_code, photos, target], "no code for every place"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert latents.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err.strip()
        assert answer in error
        assert len(error.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos", [f"{i}.png" for i in range(4)])
    monkeypatch.setattr(latents, "_latents", lambda *_: (_ for _ in ()).throw(RuntimeError("the disk is full")))
    with pytest.raises(RuntimeError):
        latents.main([str(run), str(photos), str(tmp_path / "latents")])
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_no_two_images_share_a_key():
    class Names(list):
        def name_of(self, index):
            return self[index]

    names = Names(["x/a-2.png", "x/a.png", "x/a.jpg", "one.tar/b.jpg", "two.tar/b.jpg", "x/a.2.jpg", ".tar/c.png"])
    keys = keys_of(names)
    assert len(set(keys)) == len(names)
    assert keys[:2] + keys[3:4] == ["x/a-2", "x/a", "b"]


def test_both_halves_open_without_this_project(run, tmp_path):
    assert export.main([str(run), "--format", "torch", "--out", str(tmp_path / "x")]) == 0
    halves = {half: torch.export.load(tmp_path / "x" / f"latents_{half}.pt2") for half in ("encoder", "decoder")}
    assert not any("encoder" in name for name in halves["decoder"].state_dict)  # each carries its own weights alone
    method = mae.load(run)
    for count in (1, 3):
        pixels = torch.rand(count, 3, 16, 16)
        expected = method.latents_for_diffusion((pixels - 0.5) / 0.25)
        latents = halves["encoder"].module()(pixels)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
        images = 0.5 + 0.25 * method.decode_latents(expected)
        torch.testing.assert_close(halves["decoder"].module()(latents), images, rtol=1e-4, atol=1e-4)
    assert "to_latents, to_images" in (tmp_path / "x" / "README.md").read_text()


def test_the_tool_is_listed():
    assert "latents" in TOOLS
