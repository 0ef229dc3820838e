"""Latents as the nearest of a set of codes, with a gradient straight through: van den Oord et al., arXiv:1711.00937.

`Codebook` learns its codes, as a moving average of the latents that they stand for (appendix A.1) or by gradient. `FSQ` rounds a few
bounded numbers instead: Mentzer et al., arXiv:2309.15505; its codes are a fixed grid, so that there is no codebook to collapse.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae.nets import keyed
from mae.nets.snapshot import snapshot
from mae.nets.statistics import global_mean, global_rows

KMEANS_ROUNDS = 10


class Quantised(NamedTuple):
    """Latents (B, N, w) after quantisation."""

    vectors: Tensor  # (B, N, w) float32, the codes; their gradient is handed to the latents unchanged
    indices: Tensor  # (B, N) int64
    shares: Tensor  # (codes,) how often each code was chosen, of the global batch in training
    codebook_loss: Tensor  # mean (code - sg[latent])^2; zero where no gradient moves the codes
    commitment: Tensor  # mean (latent - sg[code])^2


class Codebook(nn.Module):
    """`size` vectors of `width` numbers, learnt as a moving average or (`learned`) by gradient.

    They start as k-means of the first training batch. A code whose share of the latents falls below `restart_below` / size (a moving
    average, too) restarts as a latent of the batch, drawn in proportion to its squared error. All of this is decided by the global
    batch and the keys of its samples, however it is spread over ranks.
    """

    vectors: Tensor
    shares: Tensor
    started: Tensor

    def __init__(self, size: int, width: int, *, decay: float, restart_below: float, learned: bool) -> None:
        super().__init__()
        self.size, self.width, self.decay, self.restart_below = size, width, decay, restart_below
        vectors = torch.randn(size, width)
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.learned = learned
        # a new code counts as used twice as often as a dead one: it moves fast at first, and is soon given up where nothing comes
        self.fresh = (2 * restart_below or 1) / size
        self.register_buffer("shares", torch.full((size,), self.fresh))  # moving average of how often each is chosen
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._known_started = False  # spares the device a question at every step

    def forward(self, latents: Tensor, keys: Tensor) -> Quantised:
        """Quantises latents (B, N, w) of samples with keys (B,); in training the codebook learns from them afterwards."""
        latents = latents.float()
        if self.training and not self._known_started:
            self._start(latents.detach(), keys)
        indices = snapshot(self.indices(latents))
        codes = snapshot(self.vectors_of(indices))
        shares = share_of_codes(indices, self.size)
        quantised = Quantised(
            straight_through(codes, latents),
            indices,
            global_mean(shares) if self.training else shares,
            F.mse_loss(codes, latents.detach()) if self.learned else shares.new_zeros(()),
            F.mse_loss(latents, codes.detach()),
        )
        if self.training:
            self._learn(latents.detach(), keys, quantised)
        return quantised

    def indices(self, latents: Tensor) -> Tensor:
        """The nearest code of every latent: (..., w) -> (...) int64."""
        return nearest(latents.detach().flatten(0, -2), self.vectors.detach()).view(latents.shape[:-1])

    def vectors_of(self, indices: Tensor) -> Tensor:
        """(...) int64 -> (..., w)"""
        return F.embedding(indices, self.vectors)

    @torch.no_grad()
    def _learn(self, latents: Tensor, keys: Tensor, quantised: Quantised) -> None:
        self.shares.lerp_(quantised.shares, 1 - self.decay)
        if not self.learned:
            # moves each code towards the mean of its latents, by their part of its average share: sums / shares without the sums
            totals = global_mean(_totals(latents.flatten(0, 1), quantised.indices.flatten(), self.size))
            missing = totals - quantised.shares[:, None] * self.vectors
            self.vectors.add_((1 - self.decay) * missing / self.shares.clamp(min=1e-12)[:, None])
        dead = self.shares < self.restart_below / self.size
        errors = (latents - self.vectors_of(quantised.indices)).square().sum(2)
        drawn = draw(latents, errors, keys, self.size)
        dead &= drawn.isfinite().all(1)  # codes that are parameters are not taken back with a step that is not finite
        self.vectors.copy_(torch.where(dead[:, None], drawn, self.vectors))
        self.shares.copy_(torch.where(dead, self.fresh, self.shares))

    @torch.compiler.disable
    @torch.no_grad()
    def _start(self, latents: Tensor, keys: Tensor) -> None:
        if self.started:  # still so at the next step: a step that is taken back takes its start back
            self._known_started = True
        else:
            self.vectors.copy_(kmeans(latents, keys, self.size))
            self.started.fill_(True)


class FSQ(nn.Module):
    """Finite scalar quantisation: number i of a latent, between -1 and 1 after tanh, is rounded to levels[i] equidistant values.

    The grid is symmetric for even levels too, where the paper moves it by half a step.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        counts = torch.tensor(levels)
        self.size, self.width = int(counts.prod()), len(levels)
        self.register_buffer("levels", counts, persistent=False)
        self.register_buffer("strides", counts.cumprod(0) // counts, persistent=False)

    def forward(self, latents: Tensor, keys: Tensor) -> Quantised:
        """Rounds latents (B, N, w); the keys decide nothing here."""
        indices = self.indices(latents)
        shares = share_of_codes(indices, self.size)
        bounded, codes = latents.float().tanh(), self.vectors_of(indices)
        nothing = shares.new_zeros(())
        shares = global_mean(shares) if self.training else shares
        return Quantised(straight_through(codes, bounded), indices, shares, nothing, nothing)

    def indices(self, latents: Tensor) -> Tensor:
        """The code of every latent: (..., w) -> (...) int64, mixed radix with the first number fastest."""
        digits = ((latents.detach().float().tanh() + 1) / 2 * (self.levels - 1)).round().long()
        return (digits * self.strides).sum(-1)

    def vectors_of(self, indices: Tensor) -> Tensor:
        """(...) int64 -> (..., w), in [-1, 1]"""
        digits = indices[..., None] // self.strides % self.levels
        return 2 * digits / (self.levels - 1) - 1


def straight_through(codes: Tensor, latents: Tensor) -> Tensor:
    """The codes' values, whose gradient goes to the latents as it is (the difference added is exactly zero)."""
    return codes.detach() + (latents - latents.detach())


def nearest(rows: Tensor, vectors: Tensor) -> Tensor:
    """The index (n,) of the vector (K, w) nearest to every row (n, w), in float32 under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        rows, vectors = rows.float(), vectors.float()
        centre = vectors.mean(0)  # distances from the origin would cancel
        rows, vectors = rows - centre, vectors - centre
        return (vectors.square().sum(1) - 2 * rows @ vectors.T).argmin(1)


def share_of_codes(indices: Tensor, size: int) -> Tensor:
    """How often each code occurs among indices (...): (size,) float32 with sum 1."""
    return _members(indices.flatten(), size).mean(0)


def perplexity(shares: Tensor) -> Tensor:
    """exp of the entropy of shares (K,): how many codes would be in use if all of them were used equally."""
    return (-(shares * shares.clamp(min=1e-30).log()).sum()).exp()


def _totals(rows: Tensor, indices: Tensor, size: int) -> Tensor:
    """The sums of the rows (n, w) of each index, over n: (size, w). A product, since it is deterministic on any device."""
    with torch.autocast(rows.device.type, enabled=False):
        return _members(indices, size).T @ rows / len(rows)


def _members(indices: Tensor, size: int) -> Tensor:
    """(n,) -> (n, size) float32: 1 where a row has that index."""
    return (indices[:, None] == torch.arange(size, device=indices.device)).float()


@torch.no_grad()
def draw(latents: Tensor, weights: Tensor, keys: Tensor, count: int) -> Tensor:
    """`count` rows (count, w) of the global batch's latents (B, N, w), in proportion to weights (B, N), without replacement.

    An exponential race (Efraimidis & Spirakis, 2006) whose clocks hang on the samples' keys alone. Repeats where there are too few rows.
    """
    clocks = -torch.log1p(-keyed.uniform(keys, weights.shape[1], "draw")) / weights.float().clamp(min=1e-30)
    clocks, first = clocks.flatten().topk(min(count, clocks.numel()), largest=False)
    rows = global_rows(latents.flatten(0, 1)[first])
    order = global_rows(clocks).argsort(stable=True)
    return rows[order[torch.arange(count, device=order.device) % len(order)]]


@torch.no_grad()
def kmeans(latents: Tensor, keys: Tensor, count: int) -> Tensor:
    """Lloyd's algorithm over the global batch's latents (B, N, w): `count` centres (count, w).

    In every round empty clusters go where the error is, as in k-means|| (Bahmani et al., arXiv:1203.6402).
    """
    rows = latents.flatten(0, 1)
    centres = draw(latents, torch.ones_like(latents[..., 0]), keys, count)
    for _ in range(KMEANS_ROUNDS):
        indices = nearest(rows, centres)
        shares = global_mean(share_of_codes(indices, count))
        means = global_mean(_totals(rows, indices, count)) / shares.clamp(min=1e-12)[:, None]
        errors = (rows - means[indices]).square().sum(1).view(latents.shape[:2])
        centres = torch.where((shares > 0)[:, None], means, draw(latents, errors, keys, count))
    return centres
