"""Properties of codebooks, learnt or averaged, and of finite scalar quantisation."""

import math

import pytest
import torch
from sklearn.cluster import KMeans

from mae.nets import quantise
from mae.nets.quantise import FSQ, Codebook


def codebook(**changes):
    return Codebook(**{"size": 16, "width": 4, "decay": 0.9, "restart_below": 0.1, "learned": False, **changes})


def latents(count=64, places=8, width=4, seed=0):
    return torch.randn(count, places, width, generator=torch.Generator().manual_seed(seed)), torch.arange(count)


@pytest.mark.parametrize("learned", [False, True])
def test_straight_through_hands_the_gradient_on_unchanged(learned):
    z, keys = latents()
    z.requires_grad_()
    book = codebook(learned=learned)
    quantised = book(z, keys)
    slope = torch.randn(z.shape)
    assert torch.equal(torch.autograd.grad((quantised.vectors * slope).sum(), z, retain_graph=True)[0], slope)
    gradient = torch.autograd.grad(quantised.commitment, z)[0]
    assert gradient.abs().sum() > 0
    fresh = book.eval()(z, keys)
    assert torch.equal(fresh.vectors, book.vectors_of(fresh.indices))  # what is handed on are codes, and not the latents
    if learned:  # reconstruction does not move the codes, their own loss does
        assert torch.autograd.grad(fresh.vectors.sum(), book.vectors, allow_unused=True)[0] is None
        assert torch.autograd.grad(fresh.codebook_loss, book.vectors)[0].abs().sum() > 0


def test_the_chosen_code_is_the_nearest_far_from_the_origin_and_under_autocast():
    generator = torch.Generator().manual_seed(0)
    rows, vectors = (torch.randn(n, 16, generator=generator) + 30 for n in (500, 64))
    exact = (rows[:, None].double() - vectors.double()).square().sum(2)
    with torch.autocast("cpu", torch.bfloat16):
        chosen = quantise.nearest(rows, vectors)
    assert (exact.gather(1, chosen[:, None])[:, 0] <= exact.min(1).values * (1 + 1e-5)).all()


@pytest.mark.parametrize("levels", [[2], [5, 5, 5], [8, 5, 5, 5], [4, 3, 2]])
def test_fsq_codes_and_levels_are_a_bijection(levels):
    fsq = FSQ(levels)
    indices = torch.arange(fsq.size)
    vectors = fsq.vectors_of(indices)
    assert fsq.size == math.prod(levels)
    assert len(vectors.unique(dim=0)) == fsq.size
    assert [len(column.unique()) for column in vectors.T] == levels
    assert torch.equal(fsq.indices((vectors * 0.999).atanh()), indices)
    z = torch.randn(2, 50, len(levels), requires_grad=True)
    made = fsq(z, torch.arange(2)).vectors
    assert torch.equal(made, fsq.vectors_of(fsq.indices(z)))
    assert ((made - z.tanh()).abs() <= 1 / (torch.tensor(levels) - 1) + 1e-6).all()
    slope = torch.autograd.grad(made.sum(), z)[0]
    torch.testing.assert_close(slope, 1 - z.detach().tanh() ** 2)


def test_an_average_codebook_is_sums_over_counts_and_goes_to_the_mean_of_its_latents():
    z, keys = latents()
    book = codebook(restart_below=0.0)
    book(z, keys)
    for _ in range(200):
        indices = book(z, keys).indices
    assert torch.equal(book(z, keys).indices, indices)  # settled
    for code in range(16):
        torch.testing.assert_close(book.vectors[code], z[indices == code].mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(book.shares.sum(), torch.tensor(1.0))


def test_k_means_starts_with_most_codes_in_use_even_among_many_equal_latents():
    z, keys = latents(width=2)
    z[:, 2:] = 0.5  # as the background of digits
    quantised = codebook(width=2)(z, keys)
    assert (quantised.shares > 0).float().mean() > 0.8
    best = KMeans(16, n_init=5, random_state=0).fit(z.flatten(0, 1).numpy()).inertia_ / z.numel()
    assert quantised.commitment < 1.4 * best
    whole, half = (quantise.kmeans(z[order], keys[order], 16) for order in (torch.arange(64), torch.arange(64).flip(0)))
    torch.testing.assert_close(whole, half)  # no matter in which order the samples come


def test_dead_codes_are_revived_where_the_error_is():
    z, keys = latents()
    for learned in (False, True):
        book = codebook(learned=learned)
        book(z, keys)
        with torch.no_grad():
            book.vectors[4:] = 1000.0
        before = book(z, keys)
        assert int((before.shares > 0).sum()) <= 4
        for _ in range(20):
            after = book(z, keys)
        assert int((after.shares > 0).sum()) == 16
        assert after.commitment < 0.6 * before.commitment
    never = codebook(restart_below=0.0)
    never(z, keys)
    never.vectors[4:] = 1000.0
    for _ in range(40):
        never(z, keys)
    assert (never.vectors[4:] == 1000.0).all()
