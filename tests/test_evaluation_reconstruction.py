"""Explained variance: 1 for who knows, 0 for the mean image, a warning for who has learnt nothing; baselines see no hidden patch."""

import numpy as np
import pytest
import torch

from mae import config as configuration
from mae.data.sources import Subset, open_splits
from mae.evaluation import reconstruction
from mae.methods.mae import MAE, Reconstruction
from mae.nets import vit


@pytest.fixture(scope="module")
def config():
    return configuration.load(["data.cache=none", "data.workers=0"])


@pytest.fixture(scope="module")
def splits(config):
    return open_splits(config.data)


def build(**arguments):
    torch.manual_seed(0)
    overrides = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return MAE(vit.create_encoder("vit_tiny_patch16_224", image_size=(8, 8), channels=1, overrides=overrides), **arguments)


class Knowing(MAE):
    """Predicts the target itself where asked, scaled by `share`."""

    share = 1.0

    def predict(self, images, *, keys=None, noise=None):
        hidden = super().predict(images, keys=keys, noise=noise).hidden
        return Reconstruction(self.share * self.target(vit.patchify(images, self.patch)), hidden)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_perfect_predictions_explain_all_of_the_target(config, splits, norm_pix):
    model = build(norm_pix=norm_pix)
    model.__class__ = Knowing
    report = reconstruction.held_out(model, splits, config, device="cpu")
    assert report.figures["explained_variance_target"] == pytest.approx(1)
    assert report.figures["loss"] == pytest.approx(0)
    assert report.learning
    assert (report.figures["explained_variance"] > 0.999) is not norm_pix  # the contrast of a patch cannot be known with norm_pix


def test_who_learnt_nothing_is_warned(config, splits):
    report = reconstruction.held_out(build(), splits, config, device="cpu")
    assert not report.learning
    assert "has not left the plateau" in report.sentence
    assert report.figures["loss"] >= report.figures["baseline/mean_image"] - 0.1


def test_a_single_training_image_leaves_nothing_to_explain(config, splits):
    alone = splits._replace(train=Subset(splits.train, np.arange(1)))
    figures = reconstruction.held_out(build(), alone, config, device="cpu").figures
    assert figures["generalisation_gap"] == -figures["explained_variance_target"]


def test_figures_repeat_and_depend_on_the_masks_seed(config, splits):
    model = build()
    model.train()
    figures = [reconstruction.held_out(model, splits, config, device="cpu", seed=seed).figures for seed in (0, 0, 1)]
    assert model.training
    assert figures[0] == figures[1] != figures[2]
    assert reconstruction.held_out(model, splits, config, device="cpu", limit=10).figures != figures[0]


def test_baselines_see_only_visible_patches():
    generator = torch.Generator().manual_seed(0)
    target, grid = torch.randn(3, 12, 6, generator=generator), (3, 4)
    hidden = torch.rand(3, 12, generator=generator) < 0.7
    other = torch.where(hidden[..., None], torch.full_like(target, 99.0), target)
    for baseline in (reconstruction._nearest, lambda *a: reconstruction._colour(*a, 3)):
        torch.testing.assert_close(baseline(target, hidden, grid), baseline(other, hidden, grid))


def test_the_nearest_patch_is_the_nearest_and_colours_are_averaged_by_channel():
    target = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 6).contiguous()  # patch n holds n everywhere
    hidden = torch.tensor([[False, True, True, True, True, False]])
    assert reconstruction._nearest(target, hidden, (1, 6))[0, :, 0].tolist() == [0, 0, 0, 5, 5, 5]
    rgb = torch.tensor([1.0, 2.0, 3.0]).repeat(2).expand(1, 6, 6)  # two pixels of one colour
    torch.testing.assert_close(reconstruction._colour(rgb, hidden, (1, 6), 3), rgb)


def test_a_method_that_hides_nothing_gets_an_empty_report(config, splits):
    report = reconstruction.held_out(torch.nn.Linear(1, 1), splits, config, device="cpu")
    assert report == ({}, "", True)
