"""What sequences of codes are likely: a causal transformer over the places of an image, row by row.

As in the second stage of VQ-VAE (van den Oord et al., arXiv:1711.00937, section 3.3), with attention for PixelCNN's convolutions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae.nets import keyed


class Prior(nn.Module):
    """p(code at a place | the codes before it), for `places` places with `codes` codes each."""

    future: Tensor

    def __init__(self, *, codes: int, places: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.codes, self.places = codes, places
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.embed = nn.Embedding(codes, width)
        self.positions = nn.Parameter(torch.zeros(1, places, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.pred = nn.Linear(width, codes)
        for parameter in (self.start, self.embed.weight, self.positions):
            nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.pred.weight)  # starts as the uniform distribution
        nn.init.zeros_(self.pred.bias)
        self.register_buffer("future", torch.ones(places, places, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        """Codes (B, n) int64, n < places + 1 -> logits (B, min(n + 1, places), codes) float32: those at i have seen the codes before i."""
        x = torch.cat([self.start.expand(len(indices), -1, -1), self.embed(indices)], dim=1)[:, : self.places]
        n = x.shape[1]
        x = self.blocks(x + self.positions[:, :n], mask=self.future[:n, :n])
        return self.pred(x).float()

    def nats(self, indices: Tensor) -> Tensor:
        """-log p of codes (B, places), a place: (B,)."""
        return F.cross_entropy(self(indices).flatten(0, 1), indices.flatten(), reduction="none").view(indices.shape).mean(1)

    @torch.no_grad()
    def sample(self, keys: Tensor) -> Tensor:
        """Codes (B, places) int64 drawn place after place; a row is a function of its key (B,) alone.

        Everything before a place is computed anew for it, which for the few hundred places of an image is fast enough.
        """
        uniform = keyed.uniform(keys, self.places, "draw")
        indices = torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
        for i in range(self.places):
            below = self(indices)[:, -1].double().softmax(1).cumsum(1)  # (B, codes)
            drawn = torch.searchsorted(below, uniform[:, i : i + 1].double(), right=True).clamp(max=self.codes - 1)
            indices = torch.cat([indices, drawn], dim=1)
        return indices


def fit(prior: Prior, indices: Tensor, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> float:
    """Trains a prior on the codes (M, places) of M images with AdamW; which images make a batch hangs on the seed alone.

    Returns the mean -log p a place over the last tenth of the steps, in nats.
    """
    prior.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    key = torch.from_numpy(keyed.hash_integers(seed, torch.arange(steps).numpy())).to(indices.device)
    chosen = (keyed.uniform(key, batch_size, "draw") * len(indices)).long().clamp(max=len(indices) - 1)  # (steps, batch)
    last = []
    with torch.enable_grad():
        for step, batch in enumerate(chosen):
            loss = prior.nats(indices[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step >= steps - max(steps // 10, 1):
                last.append(loss.detach())
    prior.eval().requires_grad_(False)
    return float(torch.stack(last).mean())
