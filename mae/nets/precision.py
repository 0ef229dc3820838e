"""Which number format the forward pass runs in; weights, losses and norms stay float32."""

import contextlib
import logging
from functools import lru_cache

import torch

from mae.errors import ConfigError
from mae.nets.products import wide_products

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose(wanted: str, device: torch.device) -> str:
    """bf16 | fp16 | fp32. `auto`: bf16 where the device computes in it, else fp16 on CUDA and fp32 elsewhere. Warns of bf16 in software.

    Raises ConfigError for fp16 on a device without a loss scaler (anything but CUDA and CPU).
    """
    if wanted != "auto":
        if wanted == "fp16" and device.type not in ("cuda", "cpu"):
            raise ConfigError(f"train.precision fp16 is not for {device.type}: choose bf16 or fp32")
        if wanted == "bf16" and device.type == "cpu" and not cpu_has_bf16():
            _warn_of_software()
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def computing(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What a forward pass runs in: autocast, or float32 at the full width of a CPU's units.

    On a CPU, where two threads would share it, no cache keeps casts: a pass uses a weight once.
    """
    if precision == "fp32":
        return wide_products(device)
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=device.type != "cpu")


def cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 run in hardware here (AVX-512 BF16 or AMX); emulated ones are slower than float32."""
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(has and has())


@lru_cache(maxsize=1)  # once a process, which may choose more often
def _warn_of_software() -> None:
    logging.getLogger("mae").warning(
        "this processor computes bf16 in software: its matrix products take up to a hundred times as long as float32's; "
        "train.precision=auto takes float32 here"
    )
