"""A profile of our training step, by kinds of work."""

import argparse
import re
import time

import torch
from ours import Ours, synthetic
from peers import SIZES
from records import names_of_machine
from torch._C._profiler import _ExperimentalConfig

from mae import memory
from mae.nets import precision as precisions
from mae.training.distributed import device_of

RESERVE = 1 << 30  # bytes
# the first that fits an operation's name
KINDS = {
    "attention kernels": r"attention|flash|fmha",
    "matrix products": r"mm$|addmm|bmm|gemm|cutlass|linear|conv|nvjet|cublas|xmma",
    "copies and casts": r"copy|cat$|memcpy|clone|contiguous|to_copy|memset|fill|zero",
    "norms and softmax": r"norm|softmax|var|mean",
    "activation": r"gelu",
    "update": r"adam|foreach|lerp",
    "masks and gathers": r"sort|gather|scatter|index|embedding|bitwise|arange",
    "compiled kernels": r"triton|cpp_fused|inductor",
    "sums": r"sum|reduce",
}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=SIZES, default="vit_tiny")
    parser.add_argument("--method", choices=["mae", "crossmae"], default="mae")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--trace", help="a file to keep")
    options = parser.parse_args()
    memory.keep_freed()  # as every command does
    device, size = device_of(options.device), SIZES[options.model]
    kind = precisions.choose(options.precision, device)
    side = Ours(size, options.method, options.batch, device, compiled=options.compile)
    images = synthetic(torch.randn(options.batch, 3, size.image, size.image, device=device))
    side.steps(images, 2, kind)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    else:
        # the profiler's notes cut freed memory up: without a reserve of it the next step's tensors would lie in new pages, which is slow
        torch.ones(RESERVE // 4)
    threads = None if device.type == "cuda" else _ExperimentalConfig(profile_all_threads=True)  # a batch's halves are in their own
    with torch.profiler.profile(activities=activities, experimental_config=threads) as profile:
        began = time.perf_counter()
        side.steps(images, options.steps, kind)
        seconds = time.perf_counter() - began
    if options.trace:
        profile.export_chrome_trace(options.trace)
    on_device = device.type == "cuda"
    spent = [(e.key, (e.self_device_time_total if on_device else e.self_cpu_time_total) / 1e3, e.count) for e in profile.key_averages()]
    total = sum(ms for _, ms, _ in spent)
    print(f"{options.method} {options.model}, batch {options.batch}, {kind}, {names_of_machine(device)}")
    of_threads = "" if on_device else f", {total / options.steps:.1f} of all threads together"
    print(f"{1e3 * seconds / options.steps:.1f} ms a step{of_threads}")
    by_kind: dict[str, float] = {}
    for name, ms, _ in spent:
        by_kind[_kind(name)] = by_kind.get(_kind(name), 0.0) + ms
    for name, ms in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"{name:20} {ms / options.steps:9.2f} ms {100 * ms / total:5.1f}%")
    print("\nthe twenty operations that take most")
    for name, ms, count in sorted(spent, key=lambda item: -item[1])[:20]:
        print(f"{name[:60]:60} {ms / options.steps:9.2f} ms {count / options.steps:7.0f} calls")
    return 0


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")
