"""Rendered shapes: what is drawn is what the factors say, in splits that share no image; dSprites from its file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mae import config
from mae.data.shapes import COMBINATIONS, SHAPES, SIZES, Shapes, distance
from mae.data.sources import open_splits
from mae.errors import ConfigError


def opened(*words):
    return open_splits(config.load(["configs/data/shapes.yaml", "evaluate.protocols=[knn]", *words]).data)


@pytest.fixture(scope="module")
def shapes():
    return Shapes(2000, size=(32, 32), channels=3)


def test_the_splits_share_no_image_and_carry_their_factors():
    splits = opened("data.length=3000")
    assert [len(s) for s in splits] == [2025, 225, 750]
    combinations = [np.ravel_multi_index(s.factors.values.T, SIZES) for s in splits]
    assert len(np.unique(np.concatenate(combinations))) == 3000
    for split in splits:
        assert split.factors.values.shape == (len(split), len(split.factors.names))
        assert np.array_equal(split.labels, split.factors.values[:, 0])
        assert split.name_of(5) == split.source.name_of(int(split.positions[5])) or split.name_of(5).startswith("shape")
    assert splits.test.mask_classes == ("background", *SHAPES)


def test_an_image_is_a_function_of_its_factors_and_the_first_ones_do_not_depend_on_the_length(shapes):
    more = Shapes(5000, size=(32, 32), channels=3)
    assert np.array_equal(more.factors.values[:2000], shapes.factors.values)
    assert all(np.array_equal(more.read(i), shapes.read(i)) for i in range(20))
    assert shapes.fingerprint == Shapes(2000, size=(32, 32), channels=3).fingerprint != more.fingerprint
    assert shapes.fingerprint != Shapes(2000, size=(32, 32), channels=3, seed=1).fingerprint


def test_every_value_of_every_factor_is_as_frequent(shapes):
    for column, size in zip(shapes.factors.values.T, SIZES, strict=True):
        counts = np.bincount(column, minlength=size)
        assert len(counts) == size
        assert np.abs(counts / 2000 - 1 / size).max() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_have_area_one_about_the_origin_and_true_distances(shape):
    step = 4 / 800
    x, y = np.meshgrid(*[np.arange(-2, 2, step) + step / 2] * 2)
    inside = distance(shape, x, y) < 0
    assert inside.sum() * step**2 == pytest.approx(1, abs=0.01)
    centre = np.array([x[inside].mean(), y[inside].mean()])
    assert np.abs(centre).max() < 0.01
    near = np.abs(distance(shape, x, y)) < 0.05  # a distance has slope 1 almost everywhere
    slope = np.hypot(*np.gradient(distance(shape, x, y), step))
    assert np.median(np.abs(slope[near] - 1)) < 0.01


def test_position_size_and_mask_are_those_of_the_picture(shapes):
    grid = np.arange(32) + 0.5
    for i in range(60):
        shape, _, size, _, x, y = shapes.factors.values[i]
        mask = shapes.mask(i)
        assert set(np.unique(mask)) == {0, shape + 1}
        share = np.abs(shapes.read(i).astype(int) - 40).sum(2)
        assert (share[mask > 0] > 0).all()
        assert share[[0, -1]].sum() + share[:, [0, -1]].sum() == 0  # nothing touches the frame
        where = [(share.sum(axis) * grid).sum() / share.sum() for axis in (0, 1)]
        assert np.abs(np.array(where) - 32 * np.interp([x, y], [0, 15], [0.31, 0.69])).max() < 0.2
        assert (mask > 0).sum() == pytest.approx((32 * np.interp(size, [0, 5], [0.18, 0.34])) ** 2, rel=0.25)


def test_grey_and_oblong_frames():
    grey = Shapes(50, size=(24, 40), channels=1)
    assert grey.read(0).shape == (24, 40, 1)
    assert grey.mask(0).shape == (24, 40)
    assert all(len(np.unique(grey.read(i))) > 2 for i in range(10))  # edges are smooth


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.length=5"], "choose 8 or more"),
        ([f"data.length={COMBINATIONS + 1}"], "294,912"),
        (["data.path=somewhere"], "means nothing to the shapes"),
        (["configs/data/digits.yaml", "data.length=100"], "is for shapes, dsprites and stream"),
        (["data.name=dsprites", "evaluate.protocols=[knn]"], "data.path is missing: give the file"),
        (["data.name=dsprites", "data.path=nowhere.npz", "evaluate.protocols=[knn]"], "nowhere.npz is no file"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        opened(*words)


def test_dsprites_from_its_file(tmp_path):
    sizes = (1, 3, 2, 4, 3, 3)
    classes = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
    images = (np.random.default_rng(0).random((len(classes), 64, 64)) < 0.1).astype(np.uint8)
    file = tmp_path / "sprites.npz"
    # the published file holds a pickled dictionary too, which is never opened
    np.savez_compressed(file, imgs=images, latents_classes=classes, metadata=np.array({"title": "x"}, dtype=object))
    splits = opened("data.name=dsprites", f"data.path={file}", "evaluate.protocols=[knn]")
    assert sum(map(len, splits)) == len(classes)
    assert splits.train.factors.sizes == (3, 2, 4, 3, 3)
    whole = splits.test.source
    for i in (0, 100, len(classes) - 1):
        assert np.array_equal(whole.read(i)[..., 0], 255 * images[i])
        assert whole.factors.values[i].tolist() == classes[i, 1:].tolist()
        assert np.array_equal(whole.mask(i), images[i] * (classes[i, 1] + 1))
    assert sum(map(len, opened("data.name=dsprites", f"data.path={file}", "data.length=50", "evaluate.protocols=[knn]"))) == 50
    file.write_bytes(b"PK no archive")
    with pytest.raises(ConfigError, match="is not dSprites'"):
        opened("data.name=dsprites", f"data.path={file}", "evaluate.protocols=[knn]")


@pytest.mark.slow
def test_a_run_on_shapes_is_measured_by_all_that_factors_and_masks_allow(tmp_path):
    quick = tmp_path / "quick.yaml"
    quick.write_text("protocol: {name: generation, classifier_steps: 20, iwae_samples: 4, components: 3, draws: 3}")
    sizes = "data.length=400 data.image_size=16 encoder.embed_dim=24 encoder.num_heads=2 encoder.depth=1 method.bottleneck_size=6"
    words = [*sizes.split(), "method.name=vae", "train.steps=3", "train.batch_size=32", "track.wandb=off"]
    words += [f"evaluate.protocols=[disentanglement,segmentation,{quick}]", f"run.dir={tmp_path}/runs/x"]
    command = [sys.executable, Path(__file__).parents[1] / "pretrain.py", "configs/data/shapes.yaml", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    measured = {(e["protocol"], e["encoder"]["name"]) for e in json.loads((tmp_path / "runs/x/results.json").read_text())}
    assert {p for p, name in measured if name == "x"} == {"disentanglement", "segmentation", "generation"}
    beside = {p: {name.removeprefix("control:") for q, name in measured if q == p} - {"x"} for p in ("disentanglement", "segmentation")}
    assert beside == {"disentanglement": {"pca", "untrained"}, "segmentation": {"pixels", "untrained"}}
    figures = {file.stem for file in (tmp_path / "runs/x/figures").iterdir()}
    assert {"disentanglement-information", "segmentation-examples", "generation-samples", "generation-latent-walk"} <= figures
