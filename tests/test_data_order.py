"""The order of samples: bijections, concatenated epochs, and the same global batches for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.data.order import BLOCK, WINDOW, global_batch, permute, permute_blocks, rank_share
from mae.nets.keyed import hash_integers


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 5000), key=st.integers(-(2**63), 2**63 - 1))
def test_a_permutation_is_a_bijection(length, key):
    assert np.array_equal(np.sort(permute(np.arange(length), length, key)), np.arange(length))


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 2**40), key=st.integers(0, 2**60), position=st.integers(0, 2**40))
def test_one_position_costs_no_more_than_itself_and_stays_in_range(length, key, position):
    assert 0 <= permute(np.array([position % length]), length, key)[0] < length


@pytest.mark.parametrize("length", [5, 16, 1000])
def test_every_id_is_equally_likely_everywhere(length):
    keys = np.arange(20_000)
    for position in (0, 1, length - 1):
        counts = np.bincount(permute(np.full(len(keys), position), length, keys), minlength=length)
        expected = len(keys) / length
        chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), length - 1
        assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_neighbours_epochs_and_seeds_look_independent():
    length = 50_000
    orders = [permute(np.arange(length), length, key) for key in (0, 1, 2, 1 << 40)]
    pairs = [(a, b) for i, a in enumerate(orders) for b in orders[:i]] + [(a[:-1], a[1:]) for a in orders]
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs) < 5 / length**0.5


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 60), batch_size=st.integers(1, 90), seed=st.integers(0, 2**31), steps=st.integers(1, 6))
def test_epochs_are_concatenated_and_hold_every_sample_once(length, batch_size, seed, steps):
    batches = [global_batch(t, batch_size=batch_size, length=length, seed=seed) for t in range(steps)]
    epochs, ids = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert len(ids) == steps * batch_size
    assert np.array_equal(epochs, np.arange(len(ids)) // length)
    for epoch in range(len(ids) // length):
        assert np.array_equal(np.sort(ids[epochs == epoch]), np.arange(length))
    assert len(np.unique(ids[epochs == epochs[-1]])) == (epochs == epochs[-1]).sum()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 100), per_rank=st.integers(1, 9), world=st.integers(1, 5), seed=st.integers(0, 99), step=st.integers(0, 10**9))
def test_ranks_share_the_global_batch_in_order(length, per_rank, world, seed, step):
    size = per_rank * world
    epochs, ids = global_batch(step, batch_size=size, length=length, seed=seed)
    shares = [rank_share(step, batch_size=size, length=length, seed=seed, rank=r, world=world) for r in range(world)]
    assert np.array_equal(np.concatenate([s[0] for s in shares]), ids)
    assert np.array_equal(np.concatenate([s[1] for s in shares]), hash_integers(seed, epochs, ids))


@settings(max_examples=150, deadline=None)
@given(length=st.integers(1, 4000), block=st.integers(1, 300), window=st.integers(1, 20), key=st.integers(-(2**63), 2**63 - 1))
def test_a_block_shuffle_is_a_bijection(length, block, window, key):
    order = permute_blocks(np.arange(length), length, np.full(length, key), block=block, window=window)
    assert np.array_equal(np.sort(order), np.arange(length))


def test_a_block_shuffle_reads_few_shards_at_a_time_and_other_neighbours_each_epoch():
    length = 200_000
    orders = [permute_blocks(np.arange(length), length, np.full(length, key)) for key in (1, 2)]
    positions = [np.argsort(order) for order in orders]
    apart = [np.abs(np.diff(place)) for place in positions]
    for distance in apart:
        assert (distance < BLOCK * WINDOW).mean() > 0.995  # but where a block begins
        assert distance.mean() > BLOCK * WINDOW / 4
    assert abs(np.corrcoef(*orders)[0, 1]) < 0.2
    assert abs(np.corrcoef(*apart)[0, 1]) < 5 / length**0.5
    windows = orders[0][: length // (BLOCK * WINDOW) * BLOCK * WINDOW].reshape(-1, BLOCK * WINDOW)
    assert max(len(np.unique(window // BLOCK)) for window in windows) <= 2 * WINDOW + 2
    assert len(np.unique(orders[0][:1024] // BLOCK)) > WINDOW
