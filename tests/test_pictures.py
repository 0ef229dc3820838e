"""Pictures show what they say that they show."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interop_models import encoder_of, masked_autoencoder, untrained_run
from matplotlib.colors import to_rgb
from PIL import Image

import mae
from mae import config
from mae.commands import evaluate, features, pictures, predictions, pretrain, reconstruct
from mae.data.batch import normalise
from mae.data.given import Arrays
from mae.data.sources import open_splits
from mae.errors import Preempted
from mae.evaluation import canvas, drawing, neighbour_pictures, reconstruction_pictures
from mae.evaluation.reconstruction import at_most
from mae.evaluation.subject import Subject
from mae.interop import huggingface
from mae.keys import Data
from mae.methods.sparse import TopImages
from mae.nets.attention import last_attention
from mae.nets.vit import choose_attention
from mae.reporting import curves
from mae.training.tracking import Tracker

WORDS = ["encoder.embed_dim=32", "encoder.depth=1", "train.device=cpu", "train.precision=fp32", "train.steps=1"]  # grey digits, 8 x 8


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 20, 30, 3), np.uint8)


def test_attention_is_shared_out_evenly_where_queries_tell_nothing_apart_and_by_keys_where_they_do():
    encoder, images = encoder_of(reg_tokens=2), torch.randn(3, 3, 32, 32)
    for fused in (True, False):
        choose_attention(encoder, torch.device("cuda" if fused else "cpu"))
        shares = last_attention(encoder, images)
        assert shares.shape == (3, 4, 4, 4)
        assert (shares >= 0).all()
        assert (shares.sum((2, 3)) < 1).all()  # the rest is for the prefix tokens
        assert encoder.blocks[-1].attn.fused_attn is fused
    with torch.no_grad():
        encoder.blocks[-1].attn.qkv.weight[:32] = 0
        encoder.blocks[-1].attn.qkv.bias[:32] = 0
    for block in encoder.blocks:
        block.compile()  # changes nothing
    torch.testing.assert_close(last_attention(encoder, images), torch.full((3, 4, 4, 4), 1 / 19))
    assert last_attention(encoder_of(class_token=False, image_size=(16, 40)), torch.randn(1, 3, 16, 40)).shape == (1, 4, 2, 5)


def test_with_the_hidden_patches_own_statistics_a_perfect_prediction_is_the_image(monkeypatch):
    model, images, keys = masked_autoencoder(), torch.randn(2, 3, 32, 32), torch.arange(2)
    model.norm_pix = True
    visible = model.visible(images, keys=keys)
    assert torch.equal(reconstruction_pictures.own(model, images, keys)[~visible.isnan()], images[~visible.isnan()])
    hidden = model.predict(images, keys=keys).hidden
    patches = model.target(mae.nets.vit.patchify(images, model.patch))
    monkeypatch.setattr(model, "predict", lambda images, keys: (patches, hidden))
    torch.testing.assert_close(reconstruction_pictures.own(model, images, keys), images)


def test_unknown_pixels_are_tinted_and_marked_images_framed():
    image = np.full((2, 8, 8, 3), 0.5)
    image[1] = np.nan
    picture = drawing.image_rows([("row", image)], marked=[(0, 0)]) / 255
    tint, frame = (np.abs(picture - np.array(colour)).max(2) < 0.02 for colour in (drawing.HIDDEN, (0.698, 0.094, 0.169)))
    assert tint.any()
    assert frame.any()
    assert not (np.abs(drawing.image_rows([("row", image)]) / 255 - np.array((0.698, 0.094, 0.169))).max(2) < 0.02).any()


def test_the_patch_that_activates_an_atom_most_is_framed(monkeypatch):
    blue = np.array([0.2, 0.4, 0.9])
    picture = drawing.image_rows([("row", np.broadcast_to(blue, (1, 8, 8, 3)))], boxes={(0, 0): (4, 2, 2, 4)}) / 255
    shown, framed = (np.argwhere(np.abs(picture - colour).max(2) < 0.02) for colour in (blue, to_rgb(drawing.BOX)))
    (top, left), (height, width) = shown.min(0), np.ptp(shown, axis=0)
    near = dict(abs=0.03)
    assert ((framed.min(0) - (top, left)) / (height, width)).tolist() == [pytest.approx(4 / 8, **near), pytest.approx(2 / 8, **near)]
    assert ((framed.max(0) - (top, left)) / (height, width)).tolist() == [pytest.approx(6 / 8, **near), pytest.approx(6 / 8, **near)]

    model, images = mae.create(["configs/methods/sparse.yaml", "encoder.depth=1"]), torch.randn(4, 1, 8, 8)
    model.top_images = lambda batches, atoms, count: TopImages(torch.tensor([7]), images[None], torch.tensor([[0, 3, 4, 15]]), None)
    drawn = {}
    monkeypatch.setattr(drawing, "image_rows", lambda rows, **how: drawn.update(how))
    pictures._atoms(SimpleNamespace(model=model, config=config.load([])), [(images, None)])
    assert list(drawn["boxes"].values()) == [(0, 0, 2, 2), (0, 6, 2, 2), (2, 0, 2, 2), (6, 6, 2, 2)]


def test_pixels_that_do_not_fill_zero_to_one_are_shown_about_their_mean_and_the_caption_says_so():
    deep = config.load(["data.name=arrays", "data.path=.", "data.channels=4", f"data.mean={[0.02] * 4}", f"data.std={[0.01] * 4}"])
    shown = canvas.colours(torch.tensor([-9.0, -3.0, 0.0, 1.5, 3.0]).expand(1, 4, 1, 5), deep)
    np.testing.assert_allclose(shown[0, 0], np.repeat([[0], [0], [0.5], [0.75], [1]], 3, axis=1))
    assert canvas.captioned("input", deep) == (
        "input; black to white: mean - 3 to mean + 3 standard deviations of the data; grey: the mean of 4 channels"
    )
    sheet = predictions.shown(Arrays(np.full((1, 64, 64, 4), 0.035, np.float32), 4), 0, deep)
    assert (sheet == 191).all()  # 1.5 standard deviations above the mean
    digit = open_splits(config.load([]).data).train
    assert np.array_equal(predictions.shown(digit, 0, config.load([]))[..., :1], digit.read(0))
    dark, plain = (config.load(["data.channels=1", "data.mean=[0.3]", f"data.std=[{std}]"]) for std in (0.05, 0.3))
    assert "black to white" in canvas.captioned("", dark)
    assert canvas.captioned("input", plain) == "input"
    np.testing.assert_allclose(canvas.colours(torch.tensor([-9.0, 0.0, 1.0]).view(1, 1, 1, 3), plain)[0, 0, :, 0], [0, 0.3, 0.6], atol=1e-6)


def test_curves_are_of_what_was_measured_alike():
    rows = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3)]
    watched = "held_out/explained_variance"
    rows += [{"step": s, watched: 0.5, f"{watched}_target": 0.5, "held_out/images": 64} for s in (1, 2)] + [{"step": 3, watched: 0.9}]
    axes = curves.figure(rows, "run").axes
    assert [a.get_title("left") for a in axes] == ["Loss", "Explained variance of held-out images", "Learning rate"]
    assert [line.get_xydata().tolist() for line in axes[1].lines] == [[[1, 50], [2, 50]]]  # lines that coincide are one
    assert curves.figure(rows[:1], "run") is None


def test_a_picture_that_fails_is_left_out_and_said_but_a_signal_still_stops_the_run(tmp_path, caplog):
    def fail(error):
        raise error

    assert pictures.written(tmp_path / "a.png", lambda file: file.write_bytes(b"a"))
    assert not pictures.written(tmp_path / "b.png", lambda file: file.write_bytes(b"half") and fail(IndexError("no rows")))
    assert "b.png is not drawn: IndexError: no rows" in caplog.text
    with pytest.raises(Preempted):
        pictures.written(tmp_path / "c.png", lambda file: fail(Preempted("stopped")))
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_beside_each_image_stand_those_of_highest_cosine_similarity_and_those_of_another_class_are_framed(monkeypatch):
    cfg, drawn = config.load(["method.name=pixels", *WORDS]), []
    splits = open_splits(cfg.data)
    monkeypatch.setattr(drawing, "image_rows", lambda rows, **more: drawn.append((rows, more)))
    neighbour_pictures.draw(Subject(mae.create(["method.name=pixels", *WORDS]).eval(), cfg, splits, torch.device("cpu")))
    [(rows, more)] = drawn
    bank, asked = at_most(splits.train, neighbour_pictures.BANK), at_most(splits.validation, neighbour_pictures.QUERIES)
    known, own = (
        normalise(torch.from_numpy(np.stack([s.read(i)[..., 0] for i in range(len(s))]))[:, None], cfg.data) for s in (bank, asked)
    )
    cosines = torch.nn.functional.cosine_similarity(own.flatten(1)[:, None].double(), known.flatten(1)[None].double(), dim=2)
    nearest = cosines.argsort(dim=1, descending=True)[:, : neighbour_pictures.NEAREST]
    assert [title for title, _ in rows] == [asked.classes[label] for label in asked.labels]
    for i, (_, images) in enumerate(rows):  # the image that is asked for, then its neighbours, nearest first
        np.testing.assert_array_equal(images, canvas.colours(torch.cat([own[i : i + 1], known[nearest[i]]]), cfg))
    others = {(i, j + 1) for i, j in np.argwhere(bank.labels[nearest.numpy()] != asked.labels[:, None])}
    assert set(more["marked"]) == others
    assert others


def test_a_run_is_drawn(tmp_path, capsys, sent):
    drawn = {"reconstructions", "attention", "neighbours", "samples", "interpolations", "latent_walk"}
    run = untrained_run(tmp_path / "run", ["configs/methods/vae.yaml", *WORDS])
    assert pictures.main([str(run)]) == 0
    assert {file.stem for file in (run / "figures").glob("*.png")} == drawn
    for file in (run / "figures").glob("*.png"):
        with Image.open(file) as image:
            assert np.asarray(image).std() > 10
    assert len(capsys.readouterr().out.splitlines()) == len(drawn)
    assert evaluate.main([str(run), "configs/evaluation/spectrum.yaml", "evaluate.controls=false"]) == 0
    assert sent == ["spectrum-spectrum"]


@pytest.fixture
def sent(monkeypatch):
    """The panels that W&B is sent, or would be where it is on."""
    names = []
    monkeypatch.setattr(Tracker, "images", lambda self, name, files, step: names.append(name))
    return names


CHEAP = ("sparse", "vae")  # the others, which have no picture that few images cannot fill, when there is time
METHODS = [pytest.param(m, marks=() if m in CHEAP else pytest.mark.slow) for m in sorted(p.stem for p in Path("configs/methods").glob("*"))]


@pytest.mark.parametrize("method", METHODS)
def test_three_images_of_which_one_is_held_out_are_enough_for_every_method(method, tmp_path, caplog, sent):
    for i, image in enumerate(noise(3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    words = [f"configs/methods/{method}.yaml", "configs/data/folder.yaml", f"data.path={tmp_path}", "data.image_size=32", "data.workers=0"]
    words += ["encoder.patch_size=8", "encoder.num_heads=2", "train.batch_size=2", f"run.dir={tmp_path / 'run'}"]
    words += ["evaluate.protocols=[spectrum,generation]", "evaluate.controls=false", *WORDS, "train.steps=2"]
    assert pretrain.main([*words, *(["method.components=1"] if method == "pca" else [])]) == (2 if method == "pca" else 0)
    assert "is not drawn" not in caplog.text
    assert "is not written" not in caplog.text
    assert sorted(sent) == sorted(file.stem for file in (tmp_path / "run" / "figures").glob("*.png"))


def test_reconstructions_of_given_images_by_a_run_and_by_a_whole_model_from_elsewhere(tmp_path, capsys):
    run = untrained_run(tmp_path / "run", WORDS)
    photos = [tmp_path / "photos" / name for name in ("a=b.png", "1.png", "2.png")]
    photos[0].parent.mkdir()
    for file, image in zip(photos, noise(3), strict=True):
        Image.fromarray(image).save(file)
    assert reconstruct.main([str(run), str(photos[0]), str(photos[1])]) == 0
    assert (run / "figures" / "reconstructions-given.png").is_file()
    assert not (run / "report.html").exists()
    (run / "results.json").write_text("[]")
    damaged = tmp_path / "damaged" / "bad.png"
    damaged.parent.mkdir()
    damaged.write_bytes(photos[0].read_bytes()[:200])
    assert reconstruct.main([str(run), str(photos[1]), str(damaged), "--count", "1"]) == 0
    assert "the first 1 of 2 images" in capsys.readouterr().out
    assert (run / "report.html").is_file()
    assert features.main([str(run), str(photos[0].parent), "--out", "/proc/x/f.npz"]) == 2
    assert "/proc/x/f.npz cannot be written" in capsys.readouterr().err
    (tmp_path / "theirs").mkdir()
    huggingface.save(masked_autoencoder(), tmp_path / "theirs", data=Data())
    assert (
        reconstruct.main([str(tmp_path / "theirs"), str(tmp_path / "photos"), "--count", "2", "--out", str(tmp_path / "out" / "x.png")])
        == 0
    )
    assert (tmp_path / "out" / "x.png").is_file()
    for words, answer in (
        ([], "by which encoder"),
        ([tmp_path / "theirs"], "of which images"),
        ([run, tmp_path / "no.png"], "there is no image"),
        ([run, tmp_path / "no=.png"], "there is no image"),
        ([run, photos[0].parent, damaged.parent], "is a folder"),
        ([run, photos[1], damaged], "bad.png cannot be read"),
        ([run, damaged.parent], "bad.png cannot be read"),
        ([run, "--count", "257"], "at most 256"),
        ([run, "--out", "/proc/x/y.png"], "/proc/x/y.png cannot be written"),
        ([run, "--out", damaged / "y.png"], "cannot be written"),
        ([run, "--out", tmp_path / "x.jpg"], "does not end in .png"),
        ([run, "method.mask_ratio=0.5"], "cannot be changed here"),
        ([untrained_run(tmp_path / "bare", [*WORDS, "method.name=untrained"])], "nothing is reconstructed"),
    ):
        capsys.readouterr()
        assert reconstruct.main(list(map(str, words))) == 2
        assert answer in capsys.readouterr().err
