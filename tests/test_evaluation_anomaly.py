"""Anomalies: every patch is hidden equally often, scores and areas are the textbook's, and a planted defect is found where it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from mae import config as configuration
from mae.data.sources import Splits, Subset, open_splits
from mae.errors import ConfigError
from mae.evaluation import anomaly, anomaly_maps, anomaly_scores
from mae.evaluation.controls import Fixed, principal
from mae.evaluation.subject import Subject
from mae.methods.mae import MAE
from mae.nets import vit

CPU = torch.device("cpu")


def settings_of(name, **changes):
    return {k: v for k, v in (configuration.protocol(name) | changes).items() if k != "name"}


@settings(max_examples=60, deadline=None)
@given(patches=st.integers(2, 50), share=st.floats(0.01, 0.99), rounds=st.integers(1, 8), seed=st.integers(0, 99))
def test_every_patch_is_hidden_equally_often(patches, share, rounds, seed):
    visible = min(max(round(share * patches), 1), patches - 1)
    orders = anomaly_maps.coverings(patches, visible, rounds, seed)
    assert torch.equal(orders.sort(1).values, torch.arange(patches).expand_as(orders))  # each a permutation
    times = torch.bincount(orders[:, :visible].flatten(), minlength=patches)
    assert times.unique().numel() == 1
    assert len(orders) * visible >= rounds * patches
    if patches % visible == 0:
        assert len(orders) == rounds * patches // visible
        for one in orders.split(patches // visible):  # a round: disjoint, and together everything
            assert one[:, :visible].flatten().sort().values.tolist() == list(range(patches))


def test_four_passes_at_75_percent_hide_every_patch_exactly_three_times():
    model = mae(mask_ratio=0.75)
    orders = anomaly_maps.coverings(16, 4, 1, seed=3)
    hidden = sum(model.predict(torch.zeros(2, 1, 8, 8), noise=order.argsort().expand(2, -1).float()).hidden.int() for order in orders)
    assert (len(orders), hidden.unique().tolist()) == (4, [3])
    for order in orders:
        shown = ~model.predict(torch.zeros(1, 1, 8, 8), noise=order.argsort()[None].float()).hidden[0]
        assert shown.nonzero()[:, 0].tolist() == order[:4].sort().values.tolist()


def test_a_patch_is_scored_while_it_is_hidden_alone(monkeypatch):
    model, images = mae(mask_ratio=0.75), torch.randn(2, 1, 8, 8)
    target, asked = model.target(vit.patchify(images, (2, 2))), model.predict

    def predict(images, noise):
        hidden = asked(images, noise=noise).hidden
        return target + torch.where(hidden[..., None], 2.0, 100.0), hidden  # wrong by 2 where it is asked, anything where it sees

    monkeypatch.setattr(model, "predict", predict)
    scores = anomaly_maps._hidden_error(model, images, anomaly_maps.coverings(16, 4, 2, seed=3))
    torch.testing.assert_close(scores, torch.full((2, 16), 4.0))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(4, 60), values=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_area_is_scikit_learns_and_its_influences_sum_to_nothing(count, values, seed):
    draw = np.random.default_rng(seed)
    scores, anomalous = draw.integers(0, values, count).astype(float), draw.permutation(count) < 1 + count // 3
    ranking = anomaly_scores.rank(scores, anomalous)
    assert ranking.auroc == pytest.approx(100 * roc_auc_score(anomalous, scores))
    assert ranking.influence.sum() == pytest.approx(0, abs=1e-9)


def test_the_interval_is_that_of_the_bootstrap():
    draw = np.random.default_rng(0)
    tasks = [np.arange(400) % 4 == 0, np.arange(400) % 4 == 1]
    scores = [draw.normal(size=400) + anomalous for anomalous in tasks]
    resampled = []
    for _ in range(200):
        ids = draw.integers(0, 400, 400)
        resampled.append(np.mean([anomaly_scores.rank(s[ids], t[ids]).auroc for t, s in zip(tasks, scores, strict=True)]))
    ours = anomaly_scores.half_width([anomaly_scores.rank(s, t).influence for s, t in zip(scores, tasks, strict=True)])
    assert ours == pytest.approx(1.96 * np.std(resampled), rel=0.15)


def test_distances_and_residuals_are_scikit_learns():
    draw = torch.Generator().manual_seed(0)
    normal, queries = (100 + torch.randn(count, 12, generator=draw) for count in (80, 30))
    distances, _ = NearestNeighbors(n_neighbors=3).fit(normal.double()).kneighbors(queries.double())
    assert anomaly_scores.nearest(normal, queries, 3, block=7).numpy() == pytest.approx(distances.mean(1), rel=1e-6)
    fitted = PCA(4).fit(normal.double())
    error = np.square(queries.numpy() - fitted.inverse_transform(fitted.transform(queries.double()))).sum(1)
    assert anomaly_scores.residual(normal, queries, 4, seed=0).numpy() == pytest.approx(error, rel=1e-6)


def mae(**options):
    torch.manual_seed(0)
    overrides = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return MAE(vit.create_encoder("vit_tiny_patch16_224", image_size=(8, 8), channels=1, overrides=overrides), **options)


@pytest.fixture(scope="module")
def config():
    return configuration.load(["data.cache=none", "data.workers=0"])


@pytest.fixture(scope="module")
def splits(config):
    return Splits(*(Subset(part, np.arange(length)) for part, length in zip(open_splits(config.data), (500, 50, 200), strict=True)))


def test_a_class_of_digits_is_told_from_the_others_and_random_labels_are_not(config, splits):
    result = anomaly.evaluate(Subject(Fixed(config), config, splits, CPU), **settings_of("anomaly_one_class"))
    metrics = result.metrics
    assert metrics["auroc"] == metrics["auroc_knn"] > 98
    assert metrics["auroc_residual"] > 95
    assert metrics["auroc"] == pytest.approx(np.mean([metrics[f"auroc/{digit}"] for digit in range(10)]))
    assert (metrics["n_tasks"], metrics["n_test"], metrics["n_train"], metrics["anomalies"]) == (10, 200, 55, pytest.approx(90))
    assert "auroc_reconstruction" not in metrics
    assert next(iter(metrics)) == "auroc"

    class Mislabelled(Subset):
        @property
        def labels(self):
            return np.random.default_rng(0).permutation(super().labels)

    wrong = splits._replace(test=Mislabelled(splits.test, np.arange(200)))
    noise = anomaly.evaluate(Subject(Fixed(config), config, wrong, CPU), **settings_of("anomaly_one_class")).metrics
    assert abs(noise["auroc"] - 50) < 3 * noise["auroc_ci95"] / 1.96
    assert 1 < noise["auroc_ci95"] < 8


def test_the_order_of_the_test_images_and_doubled_ones_change_nothing(config, splits, monkeypatch):
    monkeypatch.setattr(anomaly, "_picture", lambda *_: np.zeros((1, 1, 3), np.uint8))  # most of the time otherwise
    given = settings_of("anomaly_folders", normal="3", rounds=1, bank_patches=200)
    reference = anomaly.evaluate(Subject(mae(), config, splits, CPU), **given).metrics
    doubled = splits._replace(test=Subset(splits.test, np.random.default_rng(0).permutation(200).repeat(2)))
    found = anomaly.evaluate(Subject(mae(), config, doubled, CPU), **given).metrics
    for name in ("auroc", "auroc_residual", "auroc_reconstruction", "auroc_reconstruction_top", "auroc_patch_knn", "auroc_patch_knn_top"):
        assert found[name] == pytest.approx(reference[name], abs=0.02), name
    assert reference["auroc_patch_knn"] > 60


def test_what_cannot_be_scored_is_said(config, splits):
    subject = Subject(Fixed(config), config, splits, CPU)
    for changes, message in (
        ({"scores": ["reconstruction"]}, "reconstructs nothing"),
        ({"scores": ["patch_knn", "knn"]}, "no features of patches"),
        ({"scores": ["beauty"]}, "choose from"),
        ({"normal": "good"}, "choose one of 0, 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            anomaly.evaluate(subject, **settings_of("anomaly_one_class", **changes))
    everything = Fixed(config).along(*principal(subject.material.train["mean"].x, 64))
    with pytest.raises(ConfigError, match="every image exactly"):
        anomaly.evaluate(Subject(everything, config, splits, CPU), **settings_of("anomaly_one_class", scores=["reconstruction"]))
    few = splits._replace(test=Subset(splits.test, np.flatnonzero(splits.test.labels != 3)))
    with pytest.raises(ConfigError, match="class 3 needs"):
        anomaly.evaluate(Subject(Fixed(config), config, few, CPU), **settings_of("anomaly_one_class"))


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    """Smooth plates as good images; a bright square, and a dark one, as defects, with their masks."""
    root, draw = tmp_path_factory.mktemp("plates"), np.random.default_rng(0)

    def save(path, pixels):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / path)

    def plate():
        down, across = np.mgrid[:16, :16] / 16
        return 110 + 40 * draw.uniform() * down + 40 * draw.uniform() * across + draw.normal(0, 2, (16, 16))

    for i in range(40):
        save(f"train/good/{i:02d}.png", plate())
    for i in range(12):
        save(f"test/good/{i:02d}.png", plate())
        for defect, value in (("bright", 60), ("dark", -60)):
            pixels, mask = plate(), np.zeros((16, 16))
            top, left = draw.integers(0, 3, 2) * 4
            pixels[top : top + 4, left : left + 4] += value
            mask[top : top + 4, left : left + 4] = 255
            save(f"test/{defect}/{i:02d}.png", pixels)
            save(f"ground_truth/{defect}/{i:02d}_mask.png", mask)
    return root


def test_defects_are_found_and_shown_where_they_are(plates):
    words = [
        "configs/data/folder.yaml",
        f"data.path={plates}",
        "data.image_size=16",
        "data.channels=1",
        "data.mean=[0.5]",
        "data.std=[0.2]",
    ]
    config = configuration.load([*words, "encoder.patch_size=4", "data.workers=0"])
    splits = open_splits(config.data)
    assert splits.train.labels is None
    assert splits.test.classes == ("bright", "dark", "good")
    raw = Subject(Fixed(config), config, splits, CPU)
    components = Subject(Fixed(config).along(*principal(raw.material.train["mean"].x, 3)), config, splits, CPU)
    given = settings_of("anomaly_folders", scores=["reconstruction", "knn"])
    result = anomaly.evaluate(components, **given)
    assert result.metrics["auroc"] > 99
    assert result.metrics["pixel_auroc_reconstruction"] > 95
    assert result.metrics["anomalies"] == pytest.approx(100 * 2 / 3)
    assert "auroc/good" not in result.metrics
    picture = result.pictures["reconstruction"]
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    with pytest.raises(ConfigError, match="use anomaly_folders"):
        anomaly.evaluate(raw, **settings_of("anomaly_one_class"))
    (plates / "ground_truth").rename(plates.parent / "elsewhere")
    assert not any("pixel" in name for name in anomaly.evaluate(components, **given).metrics)
