"""LARS: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888.

The MAE paper's linear probe uses it with weight decay 0; timm's LARS then falls back to plain SGD, this one does not.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each matrix is scaled by trust * |w| / |g|; vectors take the plain step.

    Where the attribute `found_inf`, a scalar on the device, is 1, a step changes nothing, as with torch's fused optimizers.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure here
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    update = update * _trust(p, update, group["trust"])
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                if self.found_inf is None:
                    state["momentum"].mul_(group["momentum"]).add_(update)
                    p.sub_(state["momentum"], alpha=group["lr"])
                else:
                    skipped, momentum = self.found_inf > 0, state["momentum"] * group["momentum"] + update
                    state["momentum"].copy_(torch.where(skipped, state["momentum"], momentum))
                    p.sub_(torch.where(skipped, 0, momentum), alpha=group["lr"])


def _trust(weight: Tensor, update: Tensor, trust: float) -> Tensor:
    """trust * |w| / |update|, and 1 where either is zero."""
    w, u = weight.norm(), update.norm()
    return torch.where((w > 0) & (u > 0), trust * w / u, torch.ones_like(w))
