"""What a run is made of while it trains, as named tensors and scalars: taken for a checkpoint, put back from one."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mae.training.optim import Average


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


def restore(tensors: dict[str, Tensor], scalars: dict[str, Any], module: nn.Module, optimizer: Optimizer, average: Average | None) -> None:
    """Puts back what `take` took; every model tensor must be there and fit."""
    module.load_state_dict(part(tensors, "model"), strict=True)
    state = part(tensors, "optimizer") | part(scalars, "optimizer")
    for name, p in module.named_parameters():
        for full, value in state.items():
            owner, _, key = full.rpartition(".")
            if owner == name:
                optimizer.state[p][key] = _like(value, p) if isinstance(value, Tensor) else value
    if average is not None:
        for name, value in part(tensors, "average").items():
            average.shadow[name].copy_(value)


def part(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under `prefix.`, without the prefix."""
    return {k.removeprefix(f"{prefix}."): v for k, v in values.items() if k.startswith(f"{prefix}.")}


def _like(value: Tensor, p: Tensor) -> Tensor:
    """On the parameter's device; a step count stays where the optimizer made it."""
    return value.to(p.device) if value.ndim or p.device.type == "cuda" else value.clone()
