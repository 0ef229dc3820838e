"""Probes that read tokens and blocks: what they read is the encoder's own, and how it is kept in memory changes nothing."""

import numpy as np
import pytest
import torch
from evaluation_images import Stripes, encoder, subject
from torch.nn import functional as F

from mae.errors import ConfigError
from mae.evaluation import attentive_probe, cka, layer_probe, layers, linear_probe, tokens
from mae.evaluation.controls import Fixed
from mae.evaluation.features import layer_name
from mae.evaluation.material import standardiser
from mae.methods.mae import MAE
from mae.nets.attentive import AttentivePool

HOW = {"learning_rates": [0.003, 0.03], "epochs": 4, "batch_size": 64}
DECAYS = {"weight_decays": [1e-4]}


@pytest.mark.parametrize("overrides", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_the_last_layer_is_the_encoders_own_features(overrides):
    given = subject(model=MAE(encoder(**{k: v for k, v in overrides.items() if k != "global_pool"})).eval(), test=Stripes(20, 3))
    found = layers.features(given, given.splits.test, [1, 2], layers.pools_of(given))
    for pool, expected in given.features(given.splits.test).items():
        torch.testing.assert_close(found[layer_name(2, pool)].x, expected.x, rtol=1e-5, atol=1e-6)
    assert len(found) == 2 * len(layers.pools_of(given))


def test_a_layers_figure_is_the_linear_probes_of_that_layer_and_the_best_is_chosen_on_validation():
    given = subject()
    result = layer_probe.evaluate(given, **HOW, **DECAYS)
    alone = linear_probe.evaluate(given.material, **HOW, **DECAYS).metrics
    assert (result.metrics["accuracy_layer2"], result.metrics["accuracy_layer2_cls"]) == (alone["accuracy"], alone["accuracy_cls"])
    by_layer = [result.settings[f"validation_accuracy_layer{n}"] for n in (1, 2)]
    assert by_layer[result.settings["layer_mean"] - 1] == max(by_layer)
    assert result.metrics["accuracy"] == result.metrics[f"accuracy_layer{result.settings['layer_mean']}"]
    assert result.pictures["depth"].std() > 10


def test_layers_that_do_not_fit_into_memory_together_are_read_one_by_one(monkeypatch):
    together = layer_probe.evaluate(subject(), **HOW, **DECAYS)
    monkeypatch.setattr(layers, "KEEP_BYTES", 0)
    assert [list(some) for some, _ in layers.materials(subject())] == [[1], [2]]
    apart = layer_probe.evaluate(subject(), **HOW, **DECAYS)
    assert (apart.metrics, apart.settings) == (together.metrics, together.settings)


def test_cka_of_the_layers_stands_in_metrics_and_picture():
    given = subject(test=Stripes(60, 3))
    result = cka.evaluate(given, draws=2)
    x = layers.features(given, given.splits.test, [1, 2], ("mean",))
    pixels = torch.from_numpy(given.splits.test.images).flatten(1).float()
    assert result.metrics["cka_layer1"] == pytest.approx(cka.debiased_cka(x["layer1"].x, x["layer2"].x), abs=1e-9)
    assert result.metrics["cka_pixels"] == pytest.approx(cka.debiased_cka(pixels, x["layer2"].x), abs=1e-4)
    assert 0 < result.metrics["cka_layer1_std"] < 0.2
    assert result.pictures["layers"].dtype == np.uint8
    with pytest.raises(ConfigError, match="too few"):
        cka.evaluate(subject(test=Stripes(7, 3)))


def test_what_has_no_tokens_or_blocks_is_refused():
    pixels = subject(model=Fixed(subject().config))
    for evaluate in (
        lambda: attentive_probe.evaluate(pixels, **HOW, weight_decay=0.1),
        lambda: layer_probe.evaluate(pixels, **HOW, **DECAYS),
        lambda: cka.evaluate(pixels),
    ):
        with pytest.raises(ConfigError, match="take an encoder"):
            evaluate()


def test_tokens_encoded_anew_in_every_epoch_give_what_kept_ones_give(monkeypatch):
    kept = attentive_probe.evaluate(subject(), **HOW, weight_decay=0.1)
    monkeypatch.setattr(tokens, "KEEP_BYTES", 0)
    assert tokens.Tokens(subject(), Stripes(5, 0)).kept is None
    anew = attentive_probe.evaluate(subject(), **HOW, weight_decay=0.1)
    assert anew.settings == kept.settings
    assert abs(anew.metrics["accuracy"] - kept.metrics["accuracy"]) <= 0.5  # one image of 200: the last bit may depend on the batch


def test_the_sources_stand_in_a_row():
    parts = Stripes(3, 0), Stripes(4, 1)
    joined = tokens.Joined(parts)
    assert [joined.read(i).tolist() for i in range(7)] == [image.tolist() for part in parts for image in part.images]
    assert joined.labels.tolist() == [*parts[0].labels, *parts[1].labels]


def test_tokens_are_standardised_as_features_are():
    given = tokens.Tokens(subject(), Stripes(300, 0))
    flat = given.kept[0].float().flatten(0, 1)
    mean, scale = standardiser(flat)
    found = attentive_probe.moments(given, torch.arange(300)).standardise(flat)
    torch.testing.assert_close(found, (flat - mean) * scale, rtol=1e-4, atol=1e-4)


def test_attentive_pooling_is_multi_head_attention_with_one_query():
    pool = AttentivePool(12, heads=3, classes=5, seed=1)
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(0))
    keys, values = (torch.einsum("bnw,hdw->bhnd", x, weight) for weight in (pool.key, pool.value))
    pooled = F.scaled_dot_product_attention(pool.query[None, :, None].expand(4, -1, -1, -1), keys, values)  # (B, H, 1, d)
    torch.testing.assert_close(pool(x), F.linear(pooled.flatten(1), pool.weight, pool.bias), rtol=1e-4, atol=1e-5)
    again = AttentivePool(12, heads=3, classes=5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(pool.parameters(), again.parameters(), strict=True))


def test_rates_trained_together_are_trained_alone():
    given = tokens.Tokens(subject(), Stripes(100, 0))
    ids, how = torch.arange(100), {"decay": 0.1, "epochs": 3, "batch_size": 32, "classes": 2, "seed": 0}
    standard = attentive_probe.moments(given, ids)
    together = attentive_probe.train(given, ids, standard, [0.001, 0.01], **how)
    for rate, classifier in zip([0.001, 0.01], together, strict=True):
        (alone,) = attentive_probe.train(given, ids, standard, [rate], **how)
        for a, b in zip(classifier.parameters(), alone.parameters(), strict=True):
            assert torch.equal(a, b)
