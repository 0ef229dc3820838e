"""Parameter groups and optimizers: AdamW as in the MAE paper, and the others that recipes ask for."""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mae.keys import Optim
from mae.training.lars import LARS
from mae.training.muon import Muon


def create(module: nn.Module, optim: Optim, precision: str = "fp32") -> Optimizer:
    """The optimizer over the module's trainable parameters, its rate still to be set by the loop. `precision` is that of forward passes.

    Vectors (biases, norms) are not decayed, nor what the module's no_weight_decay() names. With layer_decay a group's rate is
    `lr_scale` = layer_decay^(layers above it), as in BEiT (arXiv:2106.08254) and the MAE paper's fine-tuning.
    All of them leave everything as it is where their attribute `found_inf`, a scalar on the device, is 1: the host need not ask.
    """
    exempt: set[str] = getattr(module, "no_weight_decay", set)()
    if optim.layer_decay is not None:
        groups = param_groups_layer_decay(module, optim.weight_decay, no_weight_decay_list=exempt, layer_decay=optim.layer_decay)
    else:
        groups = param_groups_weight_decay(module, optim.weight_decay, no_weight_decay_list=exempt)
    lr, betas = optim.base_lr, (optim.betas[0], optim.betas[1])
    if optim.name == "adamw":
        return AdamW(groups, lr=lr, betas=betas, fused=True)
    if optim.name == "muon":
        return Muon(_matrices_apart(groups, module), lr=lr, momentum=optim.momentum, betas=betas, half=precision != "fp32")
    if optim.name == "lars":
        return LARS(groups, lr=lr, momentum=optim.momentum)
    sgd = SGD(groups, lr=lr, momentum=optim.momentum, fused=True)
    for p in (p for group in sgd.param_groups for p in group["params"] if optim.momentum):
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)  # which torch would leave unset by a first step that changes nothing
    return sgd


def _matrices_apart(groups: list[dict], module: nn.Module) -> list[dict]:
    """Sets the blocks' matrices apart from what is none (tokens, the pixel embedding, the prediction), as Muon's author advises."""
    names = {id(p): name for name, p in module.named_parameters()}

    def hidden_matrix(p: nn.Parameter) -> bool:
        return p.ndim == 2 and "blocks" in names[id(p)]

    apart = []
    for group in groups:
        for matrix in (True, False):
            params = [p for p in group["params"] if hidden_matrix(p) == matrix]
            if params:
                apart.append({**group, "params": params, "matrix": matrix})
    return apart


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets every group's rate, times its lr_scale where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Average:
    """An exponential moving average of trainable parameters and saved buffers: shadow = decay * shadow + (1 - decay) * value.

    Codebooks, running moments and variances are then those of the averaged weights. Buffers of whole numbers (counts, flags) are not
    averaged: they stay as they are.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, saved = decay, module.state_dict().keys()
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.buffers = {n: b for n, b in module.named_buffers() if n in saved and b.is_floating_point()}
        self.shadow = {n: x.detach().clone() for n, x in (*self.parameters.items(), *self.buffers.items())}

    @torch.no_grad()
    def update(self, made: Tensor | None = None) -> None:
        """One step towards the current values; none where `made`, a scalar on their device, is 0."""
        for current in (self.parameters, self.buffers):  # of which the first may be sharded
            shadow: list[Tensor] = [self.shadow[n] for n in current]
            values: list[Tensor] = list(current.values())
            if not values:
                continue
            if made is None:
                torch._foreach_lerp_(shadow, values, 1 - self.decay)
            else:
                towards = torch._foreach_sub(values, shadow)
                torch._foreach_mul_(towards, made * (1 - self.decay))
                torch._foreach_add_(shadow, towards)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the average and the current values; twice is nothing."""
        for name, value in (*self.parameters.items(), *self.buffers.items()):
            held = value.detach().clone()
            value.copy_(self.shadow[name])
            self.shadow[name].copy_(held)
