"""Who takes turns in a comparison of training steps, and where: on a CPU every program in a process of its own, as in real life.

What a program does with its memory is part of its speed there (ours keeps what it frees, as all its commands do), and is set for a whole
process. On a GPU, which hands out its own memory, all sides share one process and what it has loaded.
"""

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ours import Ours, synthetic
from peers import Size, Stepper, Textbook, adamw, transformers_model
from torch import Tensor, nn

from mae import memory
from mae.interop import huggingface, official
from mae.nets.precision import DTYPES

PROGRAMS = ("transformers", "ours", "textbook", "compiled")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Setting:
    """What all sides have in common."""

    size: Size
    batch: int
    device: torch.device
    best: str  # bf16 | fp16 | fp32: the precision that suits the device
    precisions: tuple[str, ...]  # of float32 and best
    compiled: bool  # ours
    clock: str

    def images(self) -> Tensor:
        """(B, 3, H, W), the same for all."""
        made = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size.image, self.size.image, generator=made).to(self.device)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def first_weights(size: Size) -> dict[str, Tensor]:
    """What all sides begin with: transformers' random weights, under its names."""
    torch.manual_seed(0)
    model: Any = transformers_model(size)
    torch.nn.init.normal_(model.decoder.mask_token, std=0.02)
    return model.state_dict()


def transformers_with(weights: dict[str, Tensor], setting: Setting) -> Any:
    """transformers' model on the device."""
    model = transformers_model(setting.size)
    model.load_state_dict(weights)
    return model.to(setting.device).train()


def textbook_with(weights: dict[str, Tensor], setting: Setting, *, fused: bool) -> Textbook:
    """The textbook's model on the device."""
    model = Textbook(setting.size, fused=fused)
    model.load_state_dict(official.from_ours(huggingface.to_ours(weights, "transformers")))
    return model.to(setting.device).train()


def ours_with(weights: dict[str, Tensor], setting: Setting, method: str = "mae", *words: str) -> Ours:
    """Our loop around our model; the cross decoder, which nobody else has, begins with weights of its own."""
    side = Ours(setting.size, method, setting.batch, setting.device, compiled=setting.compiled, words=words)
    state = huggingface.to_ours(weights, "transformers")
    side.method.decoder.positions.copy_(state.pop("decoder.positions"))
    if method == "mae":
        side.method.load_state_dict(state)
    return side


class Here:
    """A program's sides in this process: a name and a function that takes so many steps."""

    def __init__(self, program: str, weights: dict[str, Tensor], setting: Setting) -> None:
        self.setting, self.images = setting, setting.images()
        self.modules: list[nn.Module] = []
        self.sides: dict[str, Callable[[int], None]] = getattr(self, f"_{program}")(weights)

    def names(self) -> list[str]:
        """Those of the sides."""
        return list(self.sides)

    def seconds(self, name: str, count: int) -> float:
        """What so many steps of a side take."""
        clock = CLOCKS[self.setting.clock]
        self.setting.wait()
        began = clock()
        self.sides[name](count)
        self.setting.wait()
        return clock() - began

    def held(self, name: str) -> float | None:
        """Bytes that a step of a side holds at its peak beyond weights and moments; None where that cannot be known."""
        for module in self.modules:
            module.zero_grad(set_to_none=True)  # gradients count, and are kept from step to step by some
        with _peak(self.setting.device) as found:
            self.seconds(name, 1)
        return found[0] if found else None

    def _transformers(self, weights: dict[str, Tensor]) -> dict[str, Callable[[int], None]]:
        model = transformers_with(weights, self.setting)
        self.modules, optimizer = [model], adamw(model, fused=True)
        low = DTYPES[self.setting.best] if self.setting.best != "fp32" and "best" in self.setting.precisions else None
        sides = {}
        for attention in ("sdpa", "eager"):
            for kind, dtype in (("float32", None), *([("best", low)] if low else [])):
                step = Stepper(model, lambda x: model(x).loss, dtype=dtype, fused=True, reads_loss=False, optimizer=optimizer)
                chosen = partial(model.set_attn_implementation, attention)
                sides[f"transformers {kind} {attention}"] = self._repeated(step, chosen)
        return sides

    def _ours(self, weights: dict[str, Tensor]) -> dict[str, Callable[[int], None]]:
        setting, images = self.setting, synthetic(self.images)
        plain, cross = ours_with(weights, setting), ours_with(weights, setting, "crossmae")
        self.modules = [plain.method, cross.method]
        sides: dict[str, Callable[[int], None]] = {}
        if "float32" in setting.precisions:
            sides["ours float32"] = lambda count: plain.steps(images, count, "fp32")
        if "best" in setting.precisions:
            sides["ours best"] = lambda count: plain.steps(images, count, setting.best)
            sides["cross best"] = lambda count: cross.steps(images, count, setting.best)
        if "best" in setting.precisions and setting.device.type == "cuda":  # whose memory is worth some recomputation
            lean = ours_with(weights, setting, "mae", "train.recompute=selective")
            self.modules.append(lean.method)
            sides["lean best"] = lambda count: lean.steps(images, count, setting.best)
        return sides

    def _textbook(self, weights: dict[str, Tensor]) -> dict[str, Callable[[int], None]]:
        model = textbook_with(weights, self.setting, fused=False)
        self.modules, half = [model], torch.float16 if self.setting.device.type == "cuda" else None
        return {"textbook": self._repeated(Stepper(model, model, dtype=half, fused=None, reads_loss=True))}

    def _compiled(self, weights: dict[str, Tensor]) -> dict[str, Callable[[int], None]]:
        model = textbook_with(weights, self.setting, fused=True)
        model.compile()
        low = DTYPES[self.setting.best] if self.setting.best != "fp32" else None
        self.modules = [model]
        return {"compiled": self._repeated(Stepper(model, model, dtype=low, fused=True, reads_loss=False))}

    def _repeated(self, step: Stepper, before: Callable[[], object] = lambda: None) -> Callable[[int], None]:
        def run(count: int) -> None:
            before()
            for _ in range(count):
                step(self.images)

        return run


class Apart:
    """The same in a process of its own, which waits while others have their turn."""

    def __init__(self, program: str, weights: Path, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, program, weights, setting, torch.get_num_threads()), daemon=True, name=program
        )
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the line

    def names(self) -> list[str]:
        """Those of the sides."""
        return self._ask("names")

    def seconds(self, name: str, count: int) -> float:
        """What so many steps of a side take."""
        return self._ask("seconds", name, count)

    def held(self, name: str) -> float | None:
        """Bytes that a step of a side holds at its peak beyond weights and moments; None where that cannot be known."""
        return self._ask("held", name)

    def close(self) -> None:
        """Ends the process."""
        self.line.close()
        self.process.join()

    def _ask(self, what: str, *words: object) -> Any:
        try:
            self.line.send((what, words))
            return self.line.recv()
        except (EOFError, BrokenPipeError) as error:
            raise SystemExit(f"the process of {self.process.name} has ended; its own words stand above") from error


def _serve(line: Connection, program: str, weights: Path, setting: Setting, threads: int) -> None:
    if program == "ours":
        memory.keep_freed()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as our program does: all sides gain what it gives
    sides = Here(program, torch.load(weights, weights_only=True), setting)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            what, words = line.recv()
            line.send(getattr(sides, what)(*words))


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[float]]:
    """Yields a list that in the end holds the bytes by which memory grew at most; it stays empty where that cannot be known."""
    gc.collect()
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield found
        return
    memory.give_back()  # what earlier steps have left
    before = _resident("VmRSS")
    reset.write_text("5")  # the peak begins anew
    yield found
    found.append(_resident("VmHWM") - before)


def _resident(kind: str) -> float:
    """Bytes of this process that are in memory, now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(kind))
