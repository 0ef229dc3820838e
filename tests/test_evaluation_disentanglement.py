"""Perfect codes score 1 in whatever order and scale, rotated ones little, and codes of nothing chance."""

import numpy as np
import pytest
import torch

from mae import config as configuration
from mae.data.shapes import Shapes
from mae.data.sources import Splits, Subset, open_splits
from mae.errors import ConfigError
from mae.evaluation import disentanglement
from mae.evaluation.material import Features
from mae.evaluation.subject import Subject

IMAGES = 2000


@pytest.fixture(scope="module")
def source():
    return Shapes(IMAGES, size=(32, 32), channels=3)


@pytest.fixture(scope="module")
def factors(source):
    return source.factors


class Coded(Subject):
    """A subject whose code is whatever function of the factors is kept in place of a model."""

    def features(self, source):
        return {"mean": Features(torch.from_numpy(self.model(source.factors.values)).float(), torch.from_numpy(source.labels))}


def scores(source, code):
    config = configuration.load(["configs/data/shapes.yaml", "evaluate.protocols=[knn]"])
    half = np.arange(len(source)) % 2 == 0
    subject = Coded(code, config, Splits(Subset(source, half), Subset(source, half), source), torch.device("cpu"))
    return disentanglement.evaluate(subject, votes=1000, trees=3, draws=2)


def standardised(values):
    return (values - values.mean(0)) / values.std(0)


def turned(values):
    """Two factors in each number, in equal shares: pairs of axes turned by 45 degrees."""
    z = standardised(values)
    return np.concatenate([z[:, ::2] + z[:, 1::2], z[:, ::2] - z[:, 1::2]], axis=1)


def test_factors_as_their_own_code_are_perfect_in_any_order_and_scale(source):
    plain = scores(source, lambda values: values.astype(float))
    moved = scores(source, lambda values: values[:, [3, 1, 0, 5, 4, 2]] * np.array([2.0, -1.0, 3.0, 1.0, 0.5, 1.5]) + 4)
    for metrics in (plain.metrics, moved.metrics):
        for name in ("mig", "dci_disentanglement", "dci_completeness", "dci_informativeness", "factor_vae"):
            assert metrics[name] > 0.98, name
        # chance is 1/4 for the shape and 1/8 for the colour, 0 for the others
        assert metrics["sap"] == pytest.approx((0.75 + 0.875 + 4) / 6, abs=0.03)
        assert metrics["mig_std"] < 0.02
        assert metrics["n_test"] == IMAGES
    assert plain.metrics["mig"] == pytest.approx(moved.metrics["mig"], abs=0.01)
    assert plain.pictures["information"].dtype == np.uint8


def test_rotated_codes_score_low(source):
    metrics = scores(source, turned).metrics
    assert metrics["mig"] < 0.1
    assert metrics["dci_disentanglement"] == pytest.approx(1 - np.log(2) / np.log(6), abs=0.05)  # two of six factors a number
    assert metrics["sap"] < 0.2
    assert metrics["factor_vae"] < 0.7  # of two factors in one number, one is named


def test_a_code_that_knows_nothing_scores_chance(source):
    noise = np.random.default_rng(0)
    metrics = scores(source, lambda values: noise.normal(size=(len(values), 6))).metrics
    assert metrics["mig"] < 0.02
    assert metrics["dci_disentanglement"] < 0.15
    assert metrics["sap"] < 0.03
    assert metrics["factor_vae"] < 0.25


def test_a_second_copy_of_a_number_closes_the_gap(factors):
    twice = np.concatenate([factors.values, factors.values], axis=1).astype(float)
    assert disentanglement.mig(twice, factors) == pytest.approx(0, abs=1e-9)
    assert disentanglement.sap(twice, factors) == pytest.approx(0, abs=1e-9)
    found = disentanglement.dci(twice, factors, trees=4)
    assert found["dci_disentanglement"] > 0.98
    assert found["dci_completeness"] < 0.8


def test_numbers_that_do_not_vary_change_nothing(factors):
    z = factors.values.astype(float)
    more = np.concatenate([z, np.zeros((IMAGES, 2)), 1e-3 * np.random.default_rng(0).normal(size=(IMAGES, 1))], axis=1)
    assert disentanglement.factor_vae(more, factors, votes=500) == 1.0
    assert disentanglement.mig(more, factors) > 0.97
    mixed = [disentanglement.dci(np.concatenate([turned(z), np.zeros((IMAGES, n))], axis=1), factors, trees=3) for n in (0, 6)]
    assert mixed[1]["dci_disentanglement"] == pytest.approx(mixed[0]["dci_disentanglement"], abs=0.02)
    assert disentanglement.factor_vae(np.zeros((IMAGES, 3)), factors, votes=10) == 0.0


def test_mutual_information_of_a_known_table(factors):
    z = np.stack([factors.values[:, 0], factors.values[:, 0] // 2], axis=1).astype(float)
    found = disentanglement.mutual_information(z, factors, bins=20)[:, 0]
    counts = np.bincount(factors.values[:, 0]) / IMAGES
    assert found[0] == pytest.approx(-(counts * np.log(counts)).sum())
    assert found[1] == pytest.approx(np.log(2), abs=0.01)


def test_what_cannot_be_scored_is_said(source):
    config = configuration.load(["data.cache=none"])
    subject = Coded(None, config, open_splits(config.data), torch.device("cpu"))
    with pytest.raises(ConfigError, match="the factors of digits are not known: choose"):
        disentanglement.evaluate(subject)
    with pytest.raises(ConfigError, match="a code of 300 numbers"):
        scores(source, lambda values: np.zeros((len(values), 300)))
