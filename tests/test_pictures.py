"""Pictures show what they say that they show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from interop_models import encoder_of, masked_autoencoder, untrained_run
from PIL import Image

import mae
from mae.commands import pictures, pretrain, reconstruct
from mae.evaluation import drawing, reconstruction_pictures
from mae.interop import huggingface
from mae.keys import Data
from mae.nets.attention import last_attention
from mae.nets.vit import choose_attention
from mae.reporting import curves

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


def test_curves_are_of_what_was_measured_alike():
    rows = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3)]
    watched = "held_out/explained_variance"
    rows += [{"step": s, watched: 0.5, f"{watched}_target": 0.5, "held_out/images": 64} for s in (1, 2)] + [{"step": 3, watched: 0.9}]
    axes = curves.figure(rows, "run").axes
    assert [a.get_title("left") for a in axes] == ["Loss", "Explained variance of held-out images", "Learning rate"]
    assert [line.get_xydata().tolist() for line in axes[1].lines] == [[[1, 50], [2, 50]]]  # lines that coincide are one
    assert curves.figure(rows[:1], "run") is None


def test_a_run_is_drawn(tmp_path, capsys):
    drawn = {"reconstructions", "attention", "neighbours", "samples", "interpolations", "latent_walk"}
    run = untrained_run(tmp_path / "run", ["configs/methods/vae.yaml", *WORDS])
    assert pictures.main([str(run)]) == 0
    assert {file.stem for file in (run / "figures").glob("*.png")} == drawn
    for file in (run / "figures").glob("*.png"):
        with Image.open(file) as image:
            assert np.asarray(image).std() > 10
    assert len(capsys.readouterr().out.splitlines()) == len(drawn)


CHEAP = ("sparse", "vae")  # the others, which have no picture that few images cannot fill, when there is time
METHODS = [pytest.param(m, marks=() if m in CHEAP else pytest.mark.slow) for m in sorted(p.stem for p in Path("configs/methods").glob("*"))]


@pytest.mark.parametrize("method", METHODS)
def test_three_images_of_which_one_is_held_out_are_enough_for_every_method(method, tmp_path, caplog):
    for i, image in enumerate(noise(3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    words = [f"configs/methods/{method}.yaml", "configs/data/folder.yaml", f"data.path={tmp_path}", "data.image_size=32", "data.workers=0"]
    words += ["encoder.patch_size=8", "encoder.num_heads=2", "train.batch_size=2", f"run.dir={tmp_path / 'run'}"]
    words += ["evaluate.protocols=[spectrum,generation]", "evaluate.controls=false", *WORDS, "train.steps=2"]
    assert pretrain.main([*words, *(["method.components=1"] if method == "pca" else [])]) == (2 if method == "pca" else 0)
    assert "is not drawn" not in caplog.text
    assert "is not written" not in caplog.text


def test_reconstructions_of_given_images_by_a_run_and_by_a_whole_model_from_elsewhere(tmp_path, capsys):
    run = untrained_run(tmp_path / "run", WORDS)
    for i, image in enumerate(noise(3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert reconstruct.main([str(run), str(tmp_path / "0.png"), str(tmp_path / "1.png")]) == 0
    assert (run / "figures" / "reconstructions-given.png").is_file()
    (tmp_path / "theirs").mkdir()
    huggingface.save(masked_autoencoder(), tmp_path / "theirs", data=Data())
    assert reconstruct.main([str(tmp_path / "theirs"), str(tmp_path), "--count", "2", "--out", str(tmp_path / "out" / "x.png")]) == 0
    assert (tmp_path / "out" / "x.png").is_file()
    for words, answer in (
        ([], "by which encoder"),
        ([tmp_path / "theirs"], "of which images"),
        ([run, tmp_path / "no.png"], "there is no image"),
        ([run, "--out", tmp_path / "x.jpg"], "does not end in .png"),
        ([run, "method.mask_ratio=0.5"], "cannot be changed here"),
        ([untrained_run(tmp_path / "bare", [*WORDS, "method.name=untrained"])], "nothing is reconstructed"),
    ):
        capsys.readouterr()
        assert reconstruct.main(list(map(str, words))) == 2
        assert answer in capsys.readouterr().err
