"""Attention pooling with a linear classifier: the attentive probe of CAE (Chen et al., arXiv:2202.03026) in the form of AIM (El-Nouby et
al., arXiv:2401.08541), where a learnt query takes the place of what would else be a whole block.
"""

import torch
from torch import Tensor, nn

from mae.nets import keyed


class AttentivePool(nn.Module):
    """Standardised tokens (B, N, D) -> logits (B, C): every head attends with its own learnt query, one linear layer classifies.

    The query is folded into the keys, and values are formed after pooling. That computes the same as projecting every token, in
    2 B N D H operations instead of 2 B N D^2 twice.
    """

    query: nn.Parameter
    key: nn.Parameter
    value: nn.Parameter
    weight: nn.Parameter

    def __init__(self, width: int, *, heads: int, classes: int, seed: int) -> None:
        """`heads` divides `width`. The first weights are a pure function of the seed."""
        super().__init__()
        size = width // heads
        shapes = {"query": (heads, size), "key": (heads, size, width), "value": (heads, size, width), "weight": (classes, width)}
        for number, (name, shape) in enumerate(shapes.items()):
            key = torch.from_numpy(keyed.hash_integers(seed, number).reshape(1))
            deviation = 0.02 if name in ("query", "weight") else width**-0.5
            drawn = keyed.normal(key, torch.Size(shape).numel(), "noise").view(shape)
            self.register_parameter(name, nn.Parameter(deviation * drawn))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, C)"""
        asked = torch.einsum("hd,hdw->hw", self.query, self.key) * self.query.shape[1] ** -0.5
        attention = (tokens @ asked.T).softmax(1)  # (B, N, H)
        pooled = torch.einsum("bnh,bnw->bhw", attention, tokens)
        answer = torch.einsum("bhw,hdw->bhd", pooled, self.value).flatten(1)  # (B, D)
        return answer @ self.weight.T + self.bias
