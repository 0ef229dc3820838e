"""KID and FID are what their definitions say, a perfect generator is told from none, and the judge is always the same."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from mae import config as configuration
from mae.data.sources import Splits, Subset, open_splits
from mae.errors import ConfigError
from mae.evaluation import controls, distances, generation, jackknife, judge
from mae.evaluation.subject import Subject
from mae.methods.base import Autoencoder
from mae.methods.build import build

QUICK = dict(images=150, code_images=200, classifier_steps=25, classifier_batch=64, iwae_samples=4, iwae_images=20, draws=3, components=3)
TINY = ["data.cache=none", "encoder.depth=1", "encoder.embed_dim=16", "encoder.num_heads=2"]


def cloud(count, width=8, seed=0, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_kid_is_the_unbiased_mmd_of_its_definition():
    x, y = cloud(5, 3).double(), cloud(4, 3, seed=1).double()

    def k(a, b):
        return float((a @ b / 3 + 1) ** 3)

    by_hand = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    by_hand += np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j]) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert distances.kid(x, y) == pytest.approx(by_hand)


def test_kid_of_two_halves_is_zero_within_its_error_and_grows_with_noise():
    halves = []
    for seed in range(20):
        x = cloud(400, seed=seed)
        x, y = x[:200], x[200:]
        spread = jackknife.deviations(lambda ids, x=x, y=y: {"kid": distances.kid(x[ids], y[ids])}, 200, draws=10, seed=0)["kid_std"]
        halves.append(distances.kid(x, y) / spread)
    assert abs(np.mean(halves)) < 0.5  # unbiased
    assert np.mean(np.abs(halves) < 2) >= 0.9
    grown = [distances.kid(x, y + cloud(200, seed=99, scale=noise)) for noise in (0.0, 0.5, 1.0, 2.0)]
    assert grown == sorted(grown)
    assert grown[-1] > 0.1


def test_fid_of_equal_moments_is_zero_and_else_what_scipy_says():
    x, y = cloud(300, seed=1), cloud(200, seed=2, shift=0.3, scale=1.5) @ cloud(8, 8, seed=3)
    assert distances.fid(x, x[torch.randperm(300)]) == pytest.approx(0, abs=1e-6)
    c, d = (np.cov(z.double().numpy().T) for z in (x, y))
    expected = float((x.double().mean(0) - y.double().mean(0)).square().sum()) + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert distances.fid(x, y) == pytest.approx(expected, rel=1e-6)
    assert distances.fid(x, x + 2) == pytest.approx(8 * 4, rel=1e-4)


class Memory(Autoencoder):
    """Draws images from a list, with noise; its code is the image itself."""

    def __init__(self, images, noise):
        super().__init__(nn.Identity())
        self.images, self.noise = images, noise

    def sample(self, n, seed=0):
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))[:n]
        return self.images[chosen] + self.noise * torch.randn(n, *self.images.shape[1:], generator=torch.Generator().manual_seed(seed))


def opened(model, *words, kept=None):
    config = configuration.load([*TINY, *words])
    return Subject(model, config, open_splits(config.data), torch.device("cpu"), kept=kept)


def test_real_images_are_as_near_as_real_images_and_noise_puts_them_further(tmp_path):
    bare = opened(None)
    images = torch.cat([x for x, _ in bare.batches(bare.splits.validation)] + [x for x, _ in bare.batches(bare.splits.train)])
    asked = {noise: generation.evaluate(opened(Memory(images, noise), kept=tmp_path), **QUICK) for noise in (0.0, 0.5, 2.0)}
    found = {noise: result.metrics for noise, result in asked.items()}
    assert found[0.0]["n_test"] == 150
    perfect = found[0.0]
    assert abs(perfect["kid_in_project_prior"]) < 4 * perfect["kid_in_project_prior_std"]
    assert perfect["fid_in_project_prior"] < 2 * perfect["fid_in_project_real"]
    for kind in ("kid", "fid"):
        values = [metrics[f"{kind}_in_project_prior"] for metrics in found.values()]
        assert values == sorted(values)
    assert len({metrics["kid_in_project_real"] for metrics in found.values()}) == 1
    assert asked[0.0].settings["classifier_accuracy"] > 30
    assert len(list(tmp_path.iterdir())) == 1  # one judge, trained once


def test_a_judge_from_the_disk_is_the_judge_that_was_trained(tmp_path):
    subject = opened(None, kept=tmp_path)
    images = next(iter(subject.batches(subject.splits.test)))[0][:20]
    how = {"steps": 5, "batch_size": 32, "seed": 0}
    before = torch.get_rng_state()
    trained = judge.appoint(subject, subject.splits.train, subject.splits.validation, **how)
    judge._appointed.clear()
    read = judge.appoint(subject, subject.splits.train, subject.splits.validation, **how)
    other = judge.appoint(subject, subject.splits.train, subject.splits.validation, **how | {"seed": 1})
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(trained.features(images), read.features(images))
    assert not torch.allclose(trained.features(images), other.features(images))


def test_without_labels_distances_are_named_after_pixels():
    class Bare(Subset):
        labels, classes = None, None

    labelled = opened(None)
    splits = Splits(*(Bare(s, np.arange(len(s))) for s in labelled.splits))
    model = Memory(torch.cat([x for x, _ in labelled.batches(splits.validation)]), 0.0)
    metrics = generation.evaluate(Subject(model, labelled.config, splits, labelled.device), **QUICK | {"images": 100}).metrics
    assert "kid_pixels_prior" in metrics
    assert not any("in_project" in name for name in metrics)


@pytest.mark.parametrize("method", ["vae", "vq_vae", "pca"])
def test_every_kind_of_model_is_asked_what_it_can(method, tmp_path):
    words = [f"method.name={method}", *{"pca": ["method.components=10"], "vae": ["method.bottleneck_size=16"]}.get(method, [])]
    torch.manual_seed(0)
    subject = opened(None, *words, kept=tmp_path)
    model = build(subject.config)
    if method == "pca":
        model.fit(list(subject.batches(subject.splits.train)))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    asked = QUICK | {"prior_steps": 5, "images": 40, "classifier_steps": 2}
    result = generation.evaluate(opened(model, *words, kept=tmp_path), **asked)
    ways = {"vae": {"prior", "gmm"}, "vq_vae": {"prior"}, "pca": {"gmm"}}[method] | {"real"}
    assert {name.removeprefix("kid_in_project_") for name in result.metrics if name.startswith("kid") and "_std" not in name} == ways
    assert set(result.pictures) == {"samples"} | ({"interpolations", "latent-walk"} if method != "vq_vae" else set())
    assert ("iwae_bound" in result.metrics) == (method == "vae")
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    if method == "pca":
        assert generation.evaluate(opened(model, *words, kept=tmp_path), **asked).metrics == result.metrics


def test_principal_components_draw_beside_every_model_and_raw_pixels_do_not(tmp_path):
    subject = opened(None, kept=tmp_path)
    x = torch.cat([images.flatten(1) for images, _ in subject.batches(subject.splits.train)])
    pca = controls.Fixed(subject.config).along(*controls.principal(x, 10))
    metrics = generation.evaluate(opened(pca, kept=tmp_path), **QUICK | {"images": 60}).metrics
    assert metrics["fid_in_project_real"] < metrics["fid_in_project_gmm"]
    with pytest.raises(ConfigError, match="draws no images"):
        generation.evaluate(opened(controls.Fixed(subject.config)), **QUICK)


def test_a_model_that_draws_nothing_is_refused():
    with pytest.raises(ConfigError, match="MAE draws no images"):
        generation.evaluate(opened(build(configuration.load(TINY))), **QUICK)
