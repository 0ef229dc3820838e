"""Mean and standard deviation of the training images are NumPy's, whoever reads them, and are asked for where they are missing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_arrays import CHANNELS, computed, configured, folder

from mae.commands import statistics as command
from mae.data.sources import open_splits
from mae.data.statistics import join, of_image, pixel_moments
from mae.errors import ConfigError


def test_statistics_are_computed_stored_and_asked_for(tmp_path, capsys):
    pixels = folder(tmp_path / "d", flat=True)
    with pytest.raises(ConfigError, match="mae statistics"):
        open_splits(configured(tmp_path / "d").data)
    data = configured(tmp_path / "d", computed(tmp_path, tmp_path / "d")).data
    assert "channels 3 (from 0) are the same everywhere" in capsys.readouterr().err
    train = open_splits(data).train
    every = np.concatenate([pixels[train.name_of(i)].reshape(-1, CHANNELS) for i in range(len(train))]).astype(np.float64)
    np.testing.assert_allclose(data.mean, every.mean(0), rtol=1e-7)
    np.testing.assert_allclose(data.std, np.where(every.std(0) < 1e-6, 1, every.std(0)), rtol=1e-7)
    again = ["configs/data/arrays.yaml", f"data.path={tmp_path / 'd'}", "--out", str(tmp_path / "s.yaml")]
    assert command.main(again) == 2
    assert "exists already" in capsys.readouterr().err


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.sampled_from([0.0, 1e4, -1e6]), st.integers(0, 9))
def test_joined_moments_are_those_of_all_pixels(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    parts = [(offset + rng.normal(size=(1, n, 2))).astype(np.float32) for n in sizes]
    every = np.concatenate(parts, axis=1).reshape(-1, 2).astype(np.float64)
    found = join(map(of_image, parts))
    assert found.pixels == sum(sizes)
    np.testing.assert_allclose(found.mean, every.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std, every.std(0), rtol=1e-9, atol=1e-9)


def test_processes_do_not_change_the_statistics(tmp_path):
    folder(tmp_path, count=70)
    (tmp_path / "a" / "8.npy").write_bytes(b"damaged")
    words = [f"data.mean={[0.0] * CHANNELS}", f"data.std={[1.0] * CHANNELS}"]
    train = open_splits(configured(tmp_path, *words).data).train
    one, two = (join(pixel_moments(train, CHANNELS, workers)) for workers in (0, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    assert one.damaged == two.damaged == ("a/8.npy",)
    assert one.images == len(train) - 1
