"""What no evaluator may do: score on random labels, let a test image touch another one, choose by the test labels, depend on units."""

import numpy as np
import pytest
import torch
from evaluation_images import Stripes, encoder, subject
from scipy.stats import binom
from torch import nn

from mae.evaluation import attentive_probe, controls, few_shot, knn, layer_probe, linear_probe
from mae.methods.mae import MAE

QUICK = {"learning_rates": [0.003, 0.03], "epochs": 6, "batch_size": 64}
SETTINGS = {
    knn: {},
    linear_probe: QUICK | {"weight_decays": [1e-4]},
    few_shot: {"draws": 2, "shots": 4},
    attentive_probe: QUICK | {"weight_decay": 0.1},
    layer_probe: QUICK | {"weight_decays": [1e-4]},
}
EVALUATORS = pytest.mark.parametrize("evaluator", SETTINGS, ids=lambda module: module.__name__.rsplit(".", 1)[1])
LEARNING = [linear_probe, attentive_probe, layer_probe]


def evaluate(evaluator, given):
    return evaluator.evaluate(given if getattr(evaluator, "OF_MODEL", False) else given.material, **SETTINGS[evaluator])


def test_the_components_of_many_channels_are_those_of_few(monkeypatch):
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * torch.arange(60, 0, -1)
    mean, directions = controls.principal(x, 5)
    monkeypatch.setattr(controls, "WHOLE", 59)
    other_mean, other = controls.principal(x, 5)
    assert torch.equal(mean, other_mean)
    torch.testing.assert_close((directions.T @ other).abs(), torch.eye(5, dtype=torch.float64), atol=1e-8, rtol=0)  # but for signs


@EVALUATORS
def test_random_labels_score_chance_and_true_ones_do_not(evaluator):
    generator = np.random.default_rng(0)
    random = [s.labelled(generator.integers(2, size=len(s))) for s in (Stripes(120, 1), Stripes(40, 2), Stripes(600, 3))]
    low, high = 100 * binom.ppf([0.0005, 0.9995], 600, 0.5) / 600
    chance, learnt = evaluate(evaluator, subject(*random)).metrics, evaluate(evaluator, subject()).metrics
    for name in chance:
        if name.startswith("accuracy") and not name.endswith(("_ci95", "_std")):
            assert low < chance[name] < high, name
    assert learnt["accuracy"] > high


@EVALUATORS
def test_no_test_image_touches_another_one(evaluator):
    test, generator = Stripes(100, 3), np.random.default_rng(0)
    order = np.concatenate([generator.permutation(100), [7, 7, 7]])  # shuffled, and one image four times
    before = evaluate(evaluator, subject(test=test)).correct
    after = evaluate(evaluator, subject(test=test.taken(order))).correct
    assert before.keys() == after.keys()
    for name in before:
        assert np.array_equal(after[name], before[name][order])


@EVALUATORS
def test_test_labels_change_neither_what_is_chosen_nor_what_is_predicted(evaluator):
    test = Stripes(100, 3)
    right, wrong = (evaluate(evaluator, subject(test=test.labelled(labels))) for labels in (test.labels, 1 - test.labels))
    assert right.settings == wrong.settings
    for name in right.correct:  # of two classes: the same prediction is right under one labelling and wrong under the other
        assert np.allclose(right.correct[name] + wrong.correct[name].astype(float), 1)


@pytest.mark.parametrize("evaluator", [linear_probe, few_shot, attentive_probe, layer_probe], ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_a_power_of_two_a_dimension_changes_nothing_at_all(evaluator):
    model = MAE(encoder()).eval()
    before = evaluate(evaluator, subject(model=model))
    with torch.no_grad():
        factors = 2.0 ** torch.arange(-4, 4).repeat(2)
        model.encoder.norm.weight *= factors
        model.encoder.norm.bias *= factors
    after = evaluate(evaluator, subject(model=model))
    assert after.metrics == before.metrics
    assert after.settings == before.settings


class Permuted(nn.Module):
    def forward(self, x):
        return x.flip(-1)


@EVALUATORS
def test_the_order_of_the_dimensions_is_noise(evaluator):
    model = MAE(encoder()).eval()
    before = evaluate(evaluator, subject(model=model)).metrics["accuracy"]
    model.encoder.norm = nn.Sequential(model.encoder.norm, Permuted())
    assert abs(evaluate(evaluator, subject(model=model)).metrics["accuracy"] - before) <= (3 if evaluator in LEARNING else 0.5)
