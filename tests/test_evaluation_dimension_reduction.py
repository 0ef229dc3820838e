"""Codes against pixels: the identity keeps everything, noise nothing, and PCA exactly what PCA keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.manifold import trustworthiness

from mae import config as configuration
from mae.data.sources import Splits, Subset, open_splits
from mae.errors import ConfigError
from mae.evaluation import code_map, dimension_reduction, neighbourhoods
from mae.evaluation.controls import Fixed, principal
from mae.evaluation.linear_reconstruction import Pairs, pca_errors, ridge_errors
from mae.evaluation.subject import Subject
from mae.methods.base import Autoencoder
from mae.nets import vit

CPU = torch.device("cpu")
SETTINGS = {k: v for k, v in configuration.protocol("dimension_reduction").items() if k != "name"}


@settings(max_examples=20, deadline=None)
@given(n=st.integers(9, 60), k=st.integers(1, 4), block=st.integers(1, 60), seed=st.integers(0, 99))
def test_trustworthiness_is_scikit_learns_and_continuity_its_mirror_image(n, k, block, seed):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 8, generator=draw, dtype=torch.float64)
    codes = pixels[:, :3] + torch.randn(n, 3, generator=draw, dtype=torch.float64)
    kept = neighbourhoods.compare(pixels, codes, k, block=block)
    assert kept.trustworthiness.mean().item() == pytest.approx(trustworthiness(pixels.numpy(), codes.numpy(), n_neighbors=k))
    assert kept.continuity.mean().item() == pytest.approx(trustworthiness(codes.numpy(), pixels.numpy(), n_neighbors=k))


def test_the_identity_keeps_every_neighbour_and_noise_none():
    draw = torch.Generator().manual_seed(0)
    pixels, noise = torch.randn(800, 5, generator=draw), torch.randn(800, 5, generator=draw)
    pixels = torch.cat([pixels, pixels[:50]])  # doubled images too
    for part in neighbourhoods.compare(pixels, pixels.clone(), 10):
        assert torch.equal(part, torch.ones(850, dtype=torch.float64))
    trust, continuity, recall = (part.mean().item() for part in neighbourhoods.compare(pixels[:800], noise, 10))
    assert trust == pytest.approx(0.5, abs=0.02)
    assert continuity == pytest.approx(0.5, abs=0.02)
    assert recall == pytest.approx(10 / 799, abs=0.006)


def test_ridge_is_scikit_learns_and_its_strength_is_chosen_on_validation():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 6, generator=draw)

    def pairs(count):
        codes = torch.randn(count, 20, generator=draw)
        return Pairs(codes, codes @ truth + 3 * torch.randn(count, 6, generator=draw) + 5)

    train, validation, test = pairs(40), pairs(200), pairs(200)
    strengths, mean, deviation = (1e-6, 0.1, 10.0), train.codes.mean(0), (train.codes - train.codes.mean(0)).square().mean().sqrt()
    errors, chosen = ridge_errors(train, validation, test, strengths, CPU)
    reference = {}
    for strength in strengths:
        fitted = Ridge(alpha=strength * 40).fit((train.codes - mean) / deviation, train.pixels)
        reference[strength] = [
            np.square(fitted.predict((p.codes - mean) / deviation) - p.pixels.numpy()).sum(1) for p in (validation, test)
        ]
    assert chosen == min(strengths, key=lambda s: reference[s][0].mean()) == 0.1
    assert errors.numpy() == pytest.approx(reference[chosen][1], rel=1e-4)


@pytest.fixture(scope="module")
def config():
    return configuration.load(["data.cache=none", "data.workers=0"])


@pytest.fixture(scope="module")
def splits(config):
    return Splits(*(Subset(part, np.arange(length)) for part, length in zip(open_splits(config.data), (400, 50, 150), strict=True)))


@pytest.fixture
def no_map(monkeypatch):
    monkeypatch.setattr(code_map, "draw", lambda *_: np.zeros((1, 1, 3), np.uint8))


@pytest.mark.usefixtures("no_map")
def test_pca_is_as_good_as_pca(config, splits):
    raw = Subject(Fixed(config), config, splits, CPU)
    found = dimension_reduction.evaluate(raw, **SETTINGS).metrics
    assert (found["trustworthiness"], found["continuity"], found["recall"], found["code_size"]) == (1, 1, 1, 64)
    assert found["r2_linear"] == pytest.approx(1, abs=1e-4)
    assert "r2" not in found
    assert next(iter(found)) == "trustworthiness"
    for width in (4, 12, 64):
        components = Fixed(config).along(*principal(raw.material.train["mean"].x, width))
        found = dimension_reduction.evaluate(Subject(components, config, splits, CPU), **SETTINGS).metrics
        assert abs(found["r2_above_pca"]) < 1e-6
        assert abs(found["r2_above_pca_ci95"]) < 1e-6
        assert found["r2_linear_above_pca"] == pytest.approx(0, abs=0.005)
        test = torch.cat([images.flatten(1) for images, _ in raw.batches(splits.test)])
        train = torch.cat([images.flatten(1) for images, _ in raw.batches(splits.train)])
        total = (test - train.mean(0)).square().sum()
        assert found["r2"] == pytest.approx(1 - float(pca_errors(train, test, width, CPU).sum() / total), abs=1e-5)


class Halves(Autoencoder):
    """Keeps the upper half of an image as its code."""

    def code(self, tokens):
        return tokens[:, :8].flatten(1)

    def reconstruct(self, images):
        return torch.cat([images[:, :, :4], torch.zeros_like(images[:, :, 4:])], dim=2)


@pytest.mark.usefixtures("no_map")
def test_the_code_is_read_where_there_is_one_and_shown_images_are_no_reconstructions(config, splits):
    overrides = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    halves = Halves(vit.create_encoder("vit_tiny_patch16_224", image_size=(8, 8), channels=1, overrides=overrides))
    halves.encoder.forward_features = lambda images: vit.patchify(images, (2, 2))
    found = dimension_reduction.evaluate(Subject(halves, config, splits, CPU), **SETTINGS).metrics
    assert (found["code_size"], found["decoded_size"]) == (32, 32)
    assert 0 < found["recall"] < 0.9
    assert found["r2_above_pca"] == pytest.approx(found["r2"] - found["r2_pca"])
    assert found["r2"] < found["r2_linear"] < found["r2_pca"]

    class Large(Halves):
        def code(self, tokens):
            return super().code(tokens)[:, :, None].repeat(1, 1, 200)  # 32 places of 200: read as their mean

    halves.__class__ = Large
    found = dimension_reduction.evaluate(Subject(halves, config, splits, CPU), **SETTINGS).metrics
    assert (found["code_size"], found["decoded_size"]) == (200, 6400)
    assert found["r2_pca"] == pytest.approx(1)  # of as many components as pixels
    assert found["r2_above_pca"] == pytest.approx(found["r2"] - found["r2_pca"])

    class Shown(Halves):
        predict = None

    halves.__class__ = Shown
    found = dimension_reduction.evaluate(Subject(halves, config, splits, CPU), **SETTINGS).metrics
    assert "r2" not in found
    with pytest.raises(ConfigError, match="too few"):
        dimension_reduction.evaluate(Subject(halves, config, splits, CPU), **SETTINGS | {"images": 20})


def test_the_map_is_the_same_every_time():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 60)
    codes = 6 * draw.normal(size=(3, 5))[labels] + draw.normal(size=(60, 5))
    where = code_map.places(codes, seed=0)
    assert np.array_equal(where, code_map.places(codes, seed=0))
    centres = np.stack([where[labels == label].mean(0) for label in range(3)])
    assert (np.linalg.norm(where[:, None] - centres, axis=2).argmin(1) == labels).mean() > 0.95
    assert np.array_equal(code_map.places(codes[:, :2], seed=0), codes[:, :2])
    picture = code_map.draw(codes[:, :1], labels, tuple("abc"), seed=0)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
