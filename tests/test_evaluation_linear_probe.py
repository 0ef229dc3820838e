"""The linear probe: the sweep in one batch is the sweep one by one, AdamW is AdamW, and no choice sees the test images."""

import math

import numpy as np
import pytest
import torch
from evaluation_clouds import CLASSES, clouds, material
from scipy.stats import binom
from torch.nn import functional as F

from mae.evaluation import linear_probe
from mae.evaluation.material import Features, draw_order, score, standardiser

SPLITS = clouds(300), clouds(200, seed=2), clouds(80, seed=1)  # train, test, validation
GRID = [(0.001, 0.0), (0.01, 0.1), (0.1, 0.0)]
ARGUMENTS = dict(learning_rates=[0.001, 0.01, 0.1], weight_decays=[1e-4], epochs=10, batch_size=64)


def test_heads_trained_together_equal_heads_trained_alone():
    data, how = clouds(150), dict(epochs=5, batch_size=32, classes=CLASSES, seed=3)
    together = linear_probe.train(data, GRID, **how)
    for h, setting in enumerate(GRID):
        alone = linear_probe.train(data, [setting], **how)
        torch.testing.assert_close(together.weight[h], alone.weight[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.bias[h], alone.bias[0], rtol=1e-4, atol=1e-6)


def test_a_head_is_what_torch_trains():
    data, epochs, batch, setting = clouds(100), 4, 32, (0.01, 0.1)
    head = linear_probe.train(data, [setting], epochs=epochs, batch_size=batch, classes=CLASSES, seed=5)
    start = linear_probe.train(data, [(0.0, 0.0)], epochs=1, batch_size=100, classes=CLASSES, seed=5)
    layer = torch.nn.Linear(6, CLASSES)
    layer.load_state_dict({"weight": start.weight[0], "bias": start.bias[0]})
    mean, scale = standardiser(data.x)
    optimizer = torch.optim.AdamW(
        [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}], lr=setting[0], weight_decay=setting[1]
    )
    steps = epochs * math.ceil(100 / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    for epoch in range(epochs):
        for ids in draw_order(100, 5, epoch).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(layer((data.x[ids] - mean) * scale), data.y[ids]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(head.weight[0], layer.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.bias[0], layer.bias, rtol=1e-3, atol=1e-5)


def test_no_choice_sees_the_test_images():
    right = linear_probe.evaluate(material(*SPLITS), **ARGUMENTS, best_on_test=True)
    train, test, validation = SPLITS
    wrong = linear_probe.evaluate(material(train, Features(test.x, (test.y + 1) % CLASSES), validation), **ARGUMENTS, best_on_test=True)
    assert wrong.settings == right.settings
    assert wrong.metrics["accuracy"] < 20 < right.metrics["accuracy"]
    assert right.metrics["accuracy"] <= right.metrics["accuracy_best_on_test"]


def test_the_choice_is_made_on_validation():
    """Features whose one dimension predicts the class in train but misleads in validation: the least trained head is then the best."""
    train = clouds(300, noise=0.2)
    misleading = Features(train.x, (train.y + 1) % CLASSES)
    heads = linear_probe.train(train, [(1e-6, 0.0), (0.1, 0.0)], epochs=10, batch_size=64, classes=CLASSES, seed=0)
    assert linear_probe.choose(heads, train) == 1
    assert linear_probe.choose(heads, misleading) == 0


@pytest.mark.parametrize("change", ["permuted dimensions", "rescaled dimensions", "shifted", "a constant dimension more"])
def test_such_changes_leave_the_accuracy_within_noise(change):
    def changed(f):
        factors = 10 ** torch.linspace(-4, 4, 6)
        x = {
            "permuted dimensions": f.x.flip(1),
            "rescaled dimensions": f.x * factors,
            "shifted": f.x + 10,
            "a constant dimension more": torch.cat([f.x, torch.full((len(f.x), 1), 3.0)], dim=1),
        }[change]
        return Features(x, f.y)

    before = linear_probe.evaluate(material(*SPLITS), **ARGUMENTS).metrics["accuracy"]
    after = linear_probe.evaluate(material(*map(changed, SPLITS)), **ARGUMENTS)
    assert abs(after.metrics["accuracy"] - before) <= 1.5  # of 200 images
    assert linear_probe.evaluate(material(*SPLITS), **ARGUMENTS).metrics["accuracy"] == before


def test_random_labels_score_chance():
    generator = torch.Generator().manual_seed(0)
    noise = [
        Features(f.x, torch.randint(CLASSES, f.y.shape, generator=generator)) for f in (clouds(800), clouds(200), clouds(2000, seed=1))
    ]
    assert abs(linear_probe.evaluate(material(*noise), **ARGUMENTS).metrics["accuracy"] - 25) < 5


def test_without_validation_images_the_choice_is_made_on_a_part_of_train():
    result = linear_probe.evaluate(material(), **ARGUMENTS, folds=1)
    assert result.settings == linear_probe.evaluate(material(), **ARGUMENTS, held_out=0.1).settings
    assert result.metrics["n_train"] == 300


def test_cross_validation_holds_every_image_out_once_from_heads_that_never_learn_it():
    data, how = clouds(200, noise=0.3), dict(epochs=6, batch_size=64, classes=CLASSES, seed=1)
    found = linear_probe.cross_validated(data, GRID, 4, **how)
    assert all(0 <= right <= 200 for _, right, _ in found)
    assert found[1][1] > found[0][1]  # a rate of 0.001 has not learnt much yet
    random = Features(data.x, torch.randint(CLASSES, data.y.shape, generator=torch.Generator().manual_seed(77)))
    assert max(right for _, right, _ in linear_probe.cross_validated(random, GRID, 4, **how)) < 100  # no head knows its own fold's labels

    unseen = torch.zeros(len(GRID), 200, dtype=torch.bool)
    unseen[:, :50] = True
    other = Features(data.x, torch.where(torch.arange(200) < 50, (data.y + 1) % CLASSES, data.y))
    one, two = (linear_probe.train(d, GRID, unseen=unseen, **how) for d in (data, other))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_the_half_width_is_the_bootstraps():
    correct = torch.arange(400) < 300
    resamples = correct[torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(0))].double().mean(1)
    low, high = torch.quantile(resamples, torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert score(correct, "cls")["accuracy_cls"] == 75
    assert score(correct, "cls")["accuracy_cls_ci95"] == pytest.approx(50 * (high - low).item(), abs=0.3)
    for n, right in ((1, 0), (1, 1), (7, 3), (599, 598), (10000, 5123)):
        found = score(torch.arange(n) < right, "mean")["accuracy_ci95"]
        assert found == pytest.approx(50 * float(np.diff(binom.ppf([0.025, 0.975], n, right / n))[0]) / n)
