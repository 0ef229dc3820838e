"""What a run is made of while it trains, as named tensors and scalars: taken for a checkpoint, put back from one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mae.training.optim import Average
from mae.training.stored import Stored, fill


def take(module: nn.Module, optimizer: Optimizer, average: Average | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything a run needs to go on, as named tensors (model.*, optimizer.NAME.*, average.*) and scalars."""
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    scalars: dict[str, Any] = {}
    for name, p in module.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars[f"optimizer.{name}.{key}"] = value
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.shadow.items()}
    return tensors, scalars


@torch.no_grad()
def restore(stored: Stored, scalars: dict[str, Any], module: nn.Module, optimizer: Optimizer, average: Average | None) -> None:
    """Puts back what `take` took, under any engine and on any number of ranks. Raises ValueError where the names are not the module's."""
    weights = {f"model.{k}": v for k, v in module.state_dict().items()}
    unlike = weights.keys() ^ {name for name in stored if name.startswith("model.")}
    if unlike:
        raise ValueError(f"the checkpoint is of another model: {', '.join(sorted(unlike)[:3])}")
    for name, weight in weights.items():
        fill(weight, stored, name)
    parameters = dict(module.named_parameters())
    for full in (name for name in (*stored, *scalars) if name.startswith("optimizer.")):
        name, _, key = full.removeprefix("optimizer.").rpartition(".")
        p = parameters[name]
        optimizer.state[p][key] = scalars[full] if full in scalars else _like(p, stored, full)
    if average is not None:
        for name, shadow in average.shadow.items():
            known = f"average.{name}" in stored  # checkpoints used to average weights alone
            fill(shadow, stored, f"average.{name}" if known else f"model.{name}")


def part(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under `prefix.`, without the prefix."""
    return {k.removeprefix(f"{prefix}."): values[k] for k in values if k.startswith(f"{prefix}.")}


def _like(p: Tensor, stored: Stored, name: str) -> Tensor:
    """A number a weight lies where the weight does, in the same shares; a step count stays where the optimizer made it."""
    if isinstance(p, DTensor) and stored.dimensions(name):
        value = torch.zeros_like(p)
        fill(value, stored, name)
        return value
    value = stored[name].clone()  # what is read may be a view of the file, which is deleted in time
    return value.to(p.device) if value.ndim or p.device.type == "cuda" else value
