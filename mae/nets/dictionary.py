"""An overcomplete dictionary: tokens as sums of few atoms, in the form of Gao et al., arXiv:2406.04093, section 2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dictionary(nn.Module):
    """`units` atoms for tokens of `width` numbers, and the rows that read how much of each is in a token.

    Atoms are used divided by their norm. The length of a parameter then has no effect, so that its gradient has no part along the atom,
    and no step after the optimiser's is needed. `unit_rows`: the same for the rows. Rows start equal to their atoms.
    """

    def __init__(self, units: int, width: int, *, unit_rows: bool) -> None:
        super().__init__()
        self.units, self.unit_rows = units, unit_rows
        self.atoms = nn.Parameter(F.normalize(torch.randn(units, width), dim=1))
        self.rows = nn.Parameter(self.atoms.detach().clone())
        self.threshold = nn.Parameter(torch.zeros(units))
        self.centre = nn.Parameter(torch.zeros(width))  # of the tokens: atoms explain what differs from it

    def read(self, tokens: Tensor) -> Tensor:
        """How much of every atom is in tokens (B, N, width), before any non-linearity: (B, N, units) float32."""
        rows = F.normalize(self.rows, dim=1) if self.unit_rows else self.rows
        return F.linear(tokens - self.centre, rows, self.threshold).float()

    def forward(self, code: Tensor) -> Tensor:
        """The sum of the atoms: (B, N, units) -> (B, N, width)."""
        return self.spread(code) + self.centre

    def spread(self, code: Tensor) -> Tensor:
        """The same without the centre."""
        return F.linear(code, self.directions().T)

    def directions(self) -> Tensor:
        """The atoms as they are used (units, width)."""
        return F.normalize(self.atoms, dim=1)


def largest(x: Tensor, k: int) -> Tensor:
    """x (..., units) with all but its k largest positive numbers set to zero."""
    values, units = x.topk(k, dim=-1)
    return torch.zeros_like(x).scatter(-1, units, values.relu())
