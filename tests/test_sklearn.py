"""`mae.sklearn.Encoder` is a scikit-learn transformer like any other, and gives the features that `mae.load` gives."""

import pickle

import numpy as np
import pytest
import torch
from interop_models import untrained_run
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

import mae
from mae import config
from mae.data.batch import normalise
from mae.sklearn import Encoder

WORDS = ["encoder.embed_dim=32", "encoder.depth=1", "train.device=cpu", "train.steps=1"]  # grey digits, 8 x 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("runs") / "digits-mae", WORDS)


def expected(run, images, pool="mean"):
    pixels = torch.from_numpy(images).unsqueeze(1)
    with torch.no_grad():
        return mae.load(run).encode(normalise(pixels, config.load(WORDS).data), pool).numpy()


# of scikit-learn's own checks those that ask for no fit to a matrix of random numbers, whose rows are no images
CHECKS = [
    "do_not_raise_errors_in_init_or_set_params",
    "estimator_cloneable",
    "estimator_repr",
    "estimator_tags_renamed",
    "estimators_unfitted",
    "fit1d",
    "get_params_invariance",
    "mixin_order",
    "no_attributes_set_in_init",
    "parameters_default_constructible",
    "set_params",
    "transformers_unfitted",
    "valid_tag_types",
]


def test_scikit_learns_own_checks_of_an_estimator(run):
    for name in CHECKS:
        getattr(estimator_checks, f"check_{name}")("Encoder", Encoder(run))


def test_every_way_to_give_images_gives_the_features_of_the_encoder(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    encoder = mae.sklearn.Encoder(run, batch_size=2)
    deep = images.astype(np.uint16) * 257  # 255 -> 65535: the type says what white is
    ways = (images, images[..., None], np.repeat(images[..., None], 3, axis=3), images / 255, images.tolist(), deep)
    ways += (paths, np.array(paths, str), str(tmp_path))
    for given in ways:
        np.testing.assert_allclose(encoder.fit_transform(given), expected(run, images), rtol=1e-4, atol=1e-5)
    rows = Encoder(run, image_shape=(8, 8)).fit(images.reshape(5, 64))
    np.testing.assert_allclose(rows.transform(images.reshape(5, 64)), expected(run, images), rtol=1e-4, atol=1e-5)
    assert rows.n_features_in_ == 64
    np.testing.assert_allclose(Encoder(run, pool="cls").fit_transform(images), expected(run, images, "cls"), rtol=1e-4, atol=1e-5)
    larger = Encoder(run).fit_transform(images.repeat(3, 1).repeat(3, 2))  # scaled to the encoder's images
    assert np.corrcoef(larger.ravel(), expected(run, images).ravel())[0, 1] > 0.9


def test_it_works_in_a_pipeline_a_search_a_clone_and_a_pickle(run):
    data = load_digits()
    x, y = data.data[:120] / 16, data.target[:120]
    pipeline = make_pipeline(Encoder(run, image_shape=(8, 8)), LogisticRegression(max_iter=200))
    search = GridSearchCV(pipeline, {"encoder__pool": ["mean", "cls"], "logisticregression__C": [1.0]}, cv=2).fit(x, y)
    assert search.best_score_ > 0.3
    fitted = search.best_estimator_
    assert fitted[0].get_feature_names_out().tolist() == [f"encoder{i}" for i in range(32)]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(x), fitted.predict(x))
    assert clone(fitted[0]).get_params() == fitted[0].get_params()
    assert not hasattr(clone(fitted[0]), "model_")


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (np.zeros((2, 64)), r"say image_shape=\(H, W\)"),
        (np.zeros((2, 8, 8, 2), np.uint8), "have 2 channels, and the encoder takes 1"),
        (np.full((2, 8, 8), 16.0), "from 16 to 16 are not from 0 to 1"),
        (np.full((2, 8, 8), 256), "pixels of int64 from 256 to 256 are not from 0 to 255"),
        (np.full((2, 8, 8), np.nan), "are not from 0 to 1"),
        (np.zeros((0, 8, 8)), "are none"),
        (["nowhere.png"], "there is no image .*nowhere.png"),
        ("damaged", "damaged/a.png"),
    ],
)
def test_what_is_no_image_is_a_value_error_that_says_so(given, answer, run, tmp_path):
    if isinstance(given, str):
        (tmp_path / given).mkdir()
        (tmp_path / given / "a.png").write_bytes(b"no image")
        given, answer = tmp_path / given, "a.png"
    with pytest.raises(ValueError, match=answer):
        Encoder(run).fit(given)


def test_what_is_no_encoder_is_a_value_error_that_says_so(run):
    with pytest.raises(ValueError, match="choose one of mean, cls, latent"):
        Encoder(run, pool="max").fit()
    with pytest.raises(ValueError, match="there is no runs/nothing"):
        Encoder("runs/nothing").fit()
