"""Counter-based random numbers: a value is a pure function of (key, stream, counter), never of a generator's state.

The mixer is splitmix64 (Steele, Lea & Flood, OOPSLA 2014; the finaliser is Stafford's variant 13). The same integers come
out of torch on any device and out of NumPy, so a worker process, a GPU and a resumed run agree on every mask and crop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the data side needs the NumPy half alone, and torch takes seconds to import
    from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

# One stream a use: two uses of the same sample key never share numbers.
_NAMES = ["order", "crop", "flip", "mask", "noise", "split", "draw", "substitute", "augment", "latent"]
STREAMS = {name: i + 1 for i, name in enumerate(_NAMES)}


def _signed(value: int) -> int:
    """The int64 whose bits are those of the unsigned 64-bit value (torch has no uint64 arithmetic)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's >> on int64 copies the sign bit, so the copies are masked off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(MIX_2)
    return x ^ _shift(x, 31)


def _mix_numpy(x: np.ndarray) -> np.ndarray:
    """In place: there may be ten million of them."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(MIX_2)
    x ^= x >> np.uint64(31)
    return x


def hash_integers(*parts: int | np.ndarray) -> np.ndarray:
    """Hashes integers (broadcast against each other) to int64: `hash_integers(seed, epoch, ids)` are the sample keys.

    The order of the parts matters. Returns an int64 array of the broadcast shape.
    """
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    state = np.zeros(1, np.uint64)
    for part in parts:
        value = np.atleast_1d(np.asarray(part, np.int64)).view(np.uint64)
        state = state ^ value  # as large as the parts so far
        state += np.uint64(GOLDEN)
        state = _mix_numpy(state)
    if state.size != np.prod(shape, dtype=np.int64):
        state = np.broadcast_to(state, shape).copy()
    return state.view(np.int64).reshape(shape)


def bits(keys: Tensor, count: int, stream: str) -> Tensor:
    """`count` random int64 values a key: keys (B,) int64 -> (B, count) int64, on the device of the keys."""
    import torch

    start = _mix(keys + _signed(STREAMS[stream] * GOLDEN))
    # (i + 1) GOLDEN, as (~i) (-GOLDEN): a compiler that knows its counters' range multiplies its ends, too, and they do not fit in 64 bits
    counters = ~torch.arange(count, device=keys.device, dtype=torch.int64) * -_signed(GOLDEN)
    return _mix(start[:, None] + counters)


def bits_numpy(keys: np.ndarray, count: int, stream: str) -> np.ndarray:
    """The same integers as `bits`, in NumPy: keys (B,) int64 -> (B, count) uint64."""
    keys = np.asarray(keys, np.int64).astype(np.uint64)
    start = _mix_numpy(keys + np.uint64(STREAMS[stream] * GOLDEN & (1 << 64) - 1))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return _mix_numpy(start[:, None] + counters)


def uniform(keys: Tensor, count: int, stream: str) -> Tensor:
    """Uniform numbers in [0, 1): keys (B,) int64 -> (B, count) float32, multiples of 2^-24, the same bits on any device."""
    return _shift(bits(keys, count, stream), 40).float() * 2.0**-24


def uniform_numpy(keys: np.ndarray, count: int, stream: str) -> np.ndarray:
    """The same numbers as `uniform`, in NumPy: keys (B,) -> (B, count) float32."""
    return (bits_numpy(keys, count, stream) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def normal(keys: Tensor, count: int, stream: str) -> Tensor:
    """Standard normal numbers by the inverse error function: keys (B,) -> (B, count) float32.

    The uniforms behind them are the same bits on any device; the last bit of erfinv is the device's own.
    """
    return 2**0.5 * (2 * uniform(keys, count, stream) - 1 + 2.0**-24).erfinv()
