"""Keyed random numbers are pure functions with the right distribution; every masking hides exactly the count it says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae.nets import keyed, masking
from mae.nets.sizes import hidden_count

KEYS = torch.from_numpy(keyed.hash_integers(0, 0, np.arange(64)))


@settings(max_examples=50, deadline=None)
@given(key=st.integers(-(2**63), 2**63 - 1), count=st.integers(1, 40), stream=st.sampled_from(sorted(keyed.STREAMS)))
def test_torch_and_numpy_draw_the_same_bits(key, count, stream):
    keys = np.array([key], np.int64)
    ours = keyed.bits(torch.from_numpy(keys), count, stream).numpy().astype(np.uint64)
    assert np.array_equal(ours, keyed.bits_numpy(keys, count, stream))
    assert np.array_equal(keyed.uniform(torch.from_numpy(keys), count, stream).numpy(), keyed.uniform_numpy(keys, count, stream))


def test_a_sample_draws_the_same_alone_and_in_a_batch():
    together = keyed.uniform(KEYS, 10, "mask")
    alone = torch.cat([keyed.uniform(k[None], 10, "mask") for k in KEYS])
    assert torch.equal(together, alone)
    assert not torch.equal(together, keyed.uniform(KEYS, 10, "noise"))


def test_the_numbers_are_uniform_and_independent():
    keys = torch.from_numpy(keyed.hash_integers(1, 2, np.arange(20000)))
    draws = keyed.uniform(keys, 8, "mask").double()
    assert draws.min() >= 0
    assert draws.max() < 1
    # 5 standard errors of a uniform's mean, variance and pairwise correlation
    assert (draws.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 20000) ** 0.5
    assert (draws.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / 20000) ** 0.5
    correlation = torch.corrcoef(draws.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / 20000**0.5
    normal = keyed.normal(keys, 4, "noise").double()
    assert torch.isfinite(normal).all()
    assert (normal.mean(0)).abs().max() < 5 / 20000**0.5
    assert (normal.var(0) - 1).abs().max() < 5 * (2 / 20000) ** 0.5


def test_hashes_depend_on_every_part_and_their_order():
    base = int(keyed.hash_integers(1, 2, 3))
    assert len({base, *(int(keyed.hash_integers(*p)) for p in [(0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)])}) == 6
    ids = np.arange(100_000)
    assert len(np.unique(keyed.hash_integers(0, 0, ids))) == len(ids)


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(sorted(masking.SCHEMES)),
    grid=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    ratio=st.floats(0.05, 0.95),
)
def test_every_scheme_hides_the_same_number_and_splits_all_patches(scheme, grid, ratio):
    patches = grid[0] * grid[1]
    if not 0 < patches - int(patches * (1 - ratio)) < patches:
        return
    hidden = hidden_count(patches, ratio)
    split = masking.split_patches(masking.SCHEMES[scheme](KEYS[:5], grid, ratio), hidden)
    assert split.hidden.shape == (5, hidden)
    assert torch.equal(torch.cat(split, dim=1).sort(dim=1).values, torch.arange(patches).expand(5, -1))


def _hidden_map(scheme, grid, ratio, keys=KEYS):
    split = masking.split_patches(masking.SCHEMES[scheme](keys, grid, ratio), hidden_count(grid[0] * grid[1], ratio))
    return torch.zeros(len(keys), grid[0] * grid[1], device=keys.device).scatter(1, split.hidden, 1).view(-1, *grid)


def test_random_hides_every_patch_equally_often():
    keys = torch.from_numpy(keyed.hash_integers(5, np.arange(4000)))
    share = _hidden_map("random", (6, 6), 0.75, keys).mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_grid_at_75_percent_keeps_one_patch_of_every_two_by_two():
    kept = 1 - _hidden_map("grid", (8, 8), 0.75)
    assert torch.equal(kept.view(-1, 4, 2, 4, 2).sum((2, 4)), torch.ones(len(kept), 4, 4))


def test_block_hides_connected_areas():
    """A hidden patch has far more hidden neighbours under block than under random masking at the same share."""

    def same_neighbours(hidden):
        return (hidden[:, :, 1:] * hidden[:, :, :-1]).mean() / hidden.mean()

    assert same_neighbours(_hidden_map("block", (14, 14), 0.5)) > same_neighbours(_hidden_map("random", (14, 14), 0.5)) + 0.2


@pytest.mark.gpu
def test_cuda_draws_the_same_bits_and_masks_as_the_cpu():
    assert torch.equal(keyed.uniform(KEYS, 100, "mask"), keyed.uniform(KEYS.cuda(), 100, "mask").cpu())
    for scheme in masking.SCHEMES:
        assert torch.equal(_hidden_map(scheme, (14, 14), 0.75), _hidden_map(scheme, (14, 14), 0.75, KEYS.cuda()).cpu())
