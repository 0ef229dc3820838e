"""One model's contest: the same weights for all sides, the proof that their losses are equal, and the turns they take."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from ours import Ours, synthetic
from peers import Size, Stepper, Textbook, adamw, transformers_model
from torch import Tensor

from mae.interop import huggingface, official
from mae.methods.base import Autoencoder, Output
from mae.training import flops
from mae.training.arithmetic import shape_of
from mae.training.precision import DTYPES

EQUAL = 1e-5  # relative difference of losses in float32
COUNTED = 0.02  # relative difference of FLOPs by formula and by counter
SECONDS = {"cpu": 0.5, "cuda": 0.5}  # that a side's turn lasts at least


class Contest:
    """All sides of one model on one device. `compiled` is about ours; `quick` leaves out the compiled peer on a CPU."""

    def __init__(
        self,
        size: Size,
        batch: int,
        device: torch.device,
        best: str,
        precisions: list[str],
        *,
        compiled: bool,
        quick: bool,
        clock: Callable[[], float],
    ) -> None:
        self.size, self.batch, self.device, self.best, self.precisions = size, batch, device, best, precisions
        self.clock = clock
        torch.manual_seed(0)
        self.images = torch.randn(batch, 3, size.image, size.image, device=device)
        self.theirs = transformers_model(size)
        weights = huggingface.to_ours(self.theirs.state_dict(), "transformers")
        state = {**weights, "decoder.mask_token": torch.randn_like(weights["decoder.mask_token"]) / 50}
        self.ours = Ours(size, "mae", batch, device, compiled=compiled)
        self.cross = Ours(size, "crossmae", batch, device, compiled=compiled)
        self.textbook = Textbook(size, fused=False)
        self.textbook.load_state_dict(official.from_ours(state))
        self.compiled = None if quick and device.type == "cpu" else Textbook(size, fused=True)
        if self.compiled is not None:
            self.compiled.load_state_dict(official.from_ours(state))
        for module in (self.theirs, self.textbook, self.compiled):
            if module is not None:
                module.to(device).train()
        with torch.no_grad():
            self.theirs.decoder.mask_token.copy_(state["decoder.mask_token"])
            self.ours.method.decoder.positions.copy_(state.pop("decoder.positions"))
            self.cross.method.decoder.positions.copy_(self.ours.method.decoder.positions)
        self.ours.method.load_state_dict(state)

    def run(self, repeats: int) -> dict[str, float | None]:
        """The figures of the keys that train_step.py explains, with what they are made of printed."""
        self._prove()
        counted = self._count()
        sides = self._sides()
        if self.compiled is not None:
            self.compiled.compile()
        for name, side in sides.items():
            began = time.perf_counter()
            side(2)
            self._wait()
            print(f"  {name}: first two steps {time.perf_counter() - began:.1f} s", flush=True)
        memory = {name: self._memory(side) for name, side in sides.items()}
        took, peak = self._turns(sides, repeats)
        return self._figures(took, peak, counted, memory)

    def _prove(self) -> None:
        """Ends the program where one side's loss is not that of the others."""
        noise = torch.rand(self.batch, self.size.patches, generator=torch.Generator().manual_seed(1)).to(self.device)
        some = min(self.batch, 8)
        images, noise = self.images[:some], noise[:some]
        with torch.no_grad():
            losses = {
                "transformers": self.theirs(images, noise=noise).loss,
                "textbook": self.textbook(images, noise),
                "ours": type(self.ours.method).forward(self.ours.method, images, noise=noise).loss,
            }
            if self.compiled is not None:
                losses["textbook, fused attention"] = self.compiled(images, noise)
        values = {name: float(loss) for name, loss in losses.items()}
        apart = (max(values.values()) - min(values.values())) / values["transformers"]
        print("  losses " + ", ".join(f"{name} {value:.7f}" for name, value in values.items()) + f": {apart:.1e} apart", flush=True)
        if not apart < EQUAL:
            raise SystemExit(f"the sides do not compute the same loss: {values}")

    def _count(self) -> dict[str, float]:
        """FLOPs of our step an image, for the method and its cross variant."""
        found = {}
        for name, side in (("ours", self.ours), ("cross", self.cross)):
            formula = shape_of(side.method).flops
            counted = flops.per_image(side.method, _plain, (3, self.size.image, self.size.image))
            if not abs(formula / counted - 1) < COUNTED:
                raise SystemExit(f"FLOPs of {name}: {formula:.4g} by formula, {counted:.4g} by torch's counter")
            print(f"  {name}: {formula / 1e9:.3f} GFLOP an image and step, {100 * (formula / counted - 1):+.2f}% off torch's counter")
            found[name] = formula
        return found

    def _sides(self) -> dict[str, Callable[[int], None]]:
        """What takes turns: a name and a function that takes so many steps."""
        low, images = DTYPES[self.best] if self.best != "fp32" else None, synthetic(self.images)
        sides: dict[str, Callable[[int], None]] = {}
        optimizer = adamw(self.theirs, fused=True)
        for attention in ("sdpa", "eager"):
            for kind, dtype in (("float32", None), *([("best", low)] if low and "best" in self.precisions else [])):
                step = Stepper(self.theirs, lambda x: self.theirs(x).loss, dtype=dtype, fused=True, reads_loss=False, optimizer=optimizer)
                sides[f"transformers {kind} {attention}"] = self._repeated(step, attention)
        if "float32" in self.precisions:
            sides["ours float32"] = lambda count: self.ours.steps(images, count, "fp32")
        if "best" in self.precisions:
            sides["ours best"] = lambda count: self.ours.steps(images, count, self.best)
            sides["cross best"] = lambda count: self.cross.steps(images, count, self.best)
        half = torch.float16 if self.device.type == "cuda" else None
        sides["textbook"] = self._repeated(Stepper(self.textbook, self.textbook, dtype=half, fused=None, reads_loss=True))
        if self.compiled is not None:
            sides["compiled"] = self._repeated(Stepper(self.compiled, self.compiled, dtype=low, fused=True, reads_loss=False))
        return sides

    def _repeated(self, step: Stepper, attention: str | None = None) -> Callable[[int], None]:
        def run(count: int) -> None:
            if attention is not None:
                self.theirs.set_attn_implementation(attention)
            for _ in range(count):
                step(self.images)

        return run

    def _turns(self, sides: dict[str, Callable[[int], None]], repeats: int) -> tuple[dict[str, list[float]], list[float]]:
        """Seconds a step of every side in every turn, and the device's FLOPs a second in every turn."""
        counts = {}
        for name, side in sides.items():
            once = self._seconds(side, 1)
            counts[name] = max(round(SECONDS[self.device.type] / once), 1)
        took: dict[str, list[float]] = {name: [] for name in sides}
        peak = []
        for turn in range(repeats):
            names = list(sides)[:: 1 if turn % 2 == 0 else -1]  # there and back: nobody always follows the same one
            for name in names:
                took[name].append(self._seconds(sides[name], counts[name]) / counts[name])
            peak.append(flops.of_device(self.device, DTYPES[self.best]))
            rates = ", ".join(f"{name} {self.batch / seconds[-1]:.4g}" for name, seconds in took.items())
            print(f"  turn {turn + 1}, images/s: {rates}; matrix product {peak[-1] / 1e9:,.0f} GFLOP/s", flush=True)
        return took, peak

    def _seconds(self, side: Callable[[int], None], count: int) -> float:
        self._wait()
        began = self.clock()
        side(count)
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _memory(self, side: Callable[[int], None]) -> float | None:
        """Bytes that a step holds at its peak beyond weights and moments."""
        for module in (self.theirs, self.textbook, self.compiled):
            if module is not None:
                module.zero_grad(set_to_none=True)  # gradients count, and are kept from step to step by some
        with _peak(self.device) as found:
            side(1)
            self._wait()
        return found[0] if found else None

    def _figures(
        self, took: dict[str, list[float]], peak: list[float], counted: dict[str, float], memory: dict[str, float | None]
    ) -> dict[str, float | None]:
        for name, seconds in took.items():
            rates = sorted(self.batch / s for s in seconds)
            held = f", {memory[name] / self.batch / 2**20:.1f} MiB an image" if memory[name] else ""
            print(f"  {name}: {statistics.median(rates):.4g} images/s ({rates[0]:.4g} to {rates[-1]:.4g}){held}")
        full = {kind: _faster(took, f"transformers {kind}") for kind in ("float32", "best")}
        pairs = {
            "float32_ratio": (full["float32"], took.get("ours float32")),
            "best_ratio": (full["float32"], took.get("ours best")),
            "same_ratio": (full["best"], took.get("ours best")),
            "textbook_ratio": (took.get("textbook"), took.get("ours best")),
            "compiled_ratio": (took.get("compiled"), took.get("ours best")),
            "cross_ratio": (took.get("ours best"), took.get("cross best")),
        }
        found: dict[str, float | None] = {}
        for key, (slow, fast) in pairs.items():
            ratios = sorted(a / b for a, b in zip(slow, fast, strict=True)) if slow and fast else []
            found[key] = round(statistics.median(ratios), 3) if ratios else None
            found[key.replace("ratio", "low")] = round(ratios[0], 3) if ratios else None
            found[key.replace("ratio", "high")] = round(ratios[-1], 3) if ratios else None
            if ratios:
                print(f"  {key}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
        best = took.get("ours best")
        if best:
            mfu = [counted["ours"] * self.batch / s / p for s, p in zip(best, peak, strict=True)]
            found |= {"mfu": round(statistics.median(mfu), 3), "images_per_second": round(self.batch / statistics.median(best), 2)}
        mine, other = memory.get("ours best"), memory["textbook"]
        found["memory_ratio"] = round(mine / other, 3) if mine and other else None
        found["batch"] = self.batch
        return found


def _faster(took: dict[str, list[float]], prefix: str) -> list[float]:
    """The faster of a side's kinds of attention, in every turn."""
    return [min(turn) for turn in zip(*(s for name, s in took.items() if name.startswith(prefix)), strict=True)]


def _plain(method: Autoencoder, images: Tensor, keys: Tensor) -> Output:
    """The loss without torch.compile."""
    return type(method).forward(method, images, keys=keys)


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    if most:
        found.append(float(most))
