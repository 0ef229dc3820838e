"""Muon: Jordan et al., https://kellerjordan.github.io/posts/muon; scaled to AdamW's step as in Liu et al., arXiv:2502.16982.

A matrix moves along its momentum with all singular values set to about one. All matrices of one shape are orthogonalised
together, as one batched product: for the small matrices of a small ViT that is many times faster than one after the other.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from mae.nets.precision import cpu_has_bf16

QUINTIC = (3.4445, -4.7750, 2.0315)  # the post's coefficients: after five rounds singular values lie between about 0.7 and 1.2
ROUNDS = 5


class Muon(Optimizer):
    """Muon for the groups that say `matrix: True`, AdamW (fused) for the others, with one learning rate for both.

    With `half` its matrices are orthogonalised in bfloat16 on a CPU too, as suits a run whose forward passes are.
    The update of a matrix (out, in) is scaled by 0.2 * sqrt(max(out, in)) to AdamW's usual root mean square, so that one rate fits both.
    Where the attribute `found_inf`, a scalar on the device, is 1, a step changes nothing, as with torch's fused optimizers.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float], half: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "matrix": False})
        self.half = half

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure here
        """One update from the gradients; parameters without one stay."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._matrices if group["matrix"] else self._vectors)(parameters, group)

    def _matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        momenta = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]  # all of them: `step` has looked
        if self.found_inf is not None:  # a gradient like its momentum leaves that as it is, and the update finite
            gradients = [torch.where(self.found_inf > 0, m, g) for m, g in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])

        alike = defaultdict(list)
        for i, p in enumerate(parameters):
            alike[tuple(sorted(p.shape))].append(i)  # tall ones are turned: a shape and its transpose go together
        updates = list(nesterov)
        for (short, long), members in alike.items():
            together = torch.stack([nesterov[i] if nesterov[i].shape[0] == short else nesterov[i].T for i in members])
            for i, update in zip(members, orthogonalise(together, half=self.half) * (0.2 * long**0.5), strict=True):
                updates[i] = (update if parameters[i].shape[0] == short else update.T).to(parameters[i].dtype)
        decay = group["lr"] * group["weight_decay"]
        if self.found_inf is None:
            torch._foreach_mul_(parameters, 1 - decay)
        else:
            made = 1 - self.found_inf
            torch._foreach_mul_(updates, made)
            torch._foreach_mul_(parameters, 1 - decay * made)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _vectors(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            max_exp_avg_sqs=[],
            state_steps=[s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
            found_inf=self.found_inf,
        )


def orthogonalise(matrices: Tensor, *, half: bool = False) -> Tensor:
    """(M, short, long) -> the same with singular values near one, by Newton-Schulz rounds: in bfloat16 on CUDA and, with `half`, on a CPU
    that computes in it; in float32 elsewhere.
    """
    a, b, c = QUINTIC
    x = matrices.float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # now every singular value is at most one
    if x.is_cuda or (half and x.device.type == "cpu" and cpu_has_bf16()):
        x = x.bfloat16()
    for _ in range(ROUNDS):
        gram = x @ x.mT  # (M, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
