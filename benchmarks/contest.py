"""One model's contest: the proof that all sides compute the same loss, and the turns that they take."""

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from peers import Size
from sides import PROGRAMS, Apart, Here, Setting, first_weights, ours_with, textbook_with, transformers_with
from torch import Tensor

from mae.methods.base import Autoencoder, Output
from mae.nets.precision import DTYPES
from mae.training import flops
from mae.training.arithmetic import shape_of

EQUAL = 1e-5  # relative difference of losses in float32
COUNTED = 0.02  # relative difference of FLOPs by formula and by counter
SECONDS = {"cpu": 0.5, "cuda": 0.5}  # that a side's turn lasts at least


class Contest:
    """All sides of one model on one device. `quick` leaves out the compiled peer."""

    def __init__(self, size: Size, setting: Setting, *, quick: bool) -> None:
        self.size, self.setting, self.batch, self.device = size, setting, setting.batch, setting.device
        self.programs = [name for name in PROGRAMS if not (quick and name == "compiled")]
        self.weights = first_weights(size)

    def run(self, repeats: int) -> dict[str, float | None]:
        """The figures of the keys that train_step.py explains, with what they are made of printed."""
        prove(self.weights, self.setting)
        counted = {method: self._count(method) for method in ("mae", "crossmae")}
        with self._hosts() as hosts:
            for name, host in hosts.items():
                print(f"  {name}: first two steps {host.seconds(name, 2):.1f} s", flush=True)
            memory = {name: host.held(name) for name, host in hosts.items()}
            took, peak = self._turns(hosts, repeats)
        return self._figures(took, peak, counted["mae"], memory)

    def _count(self, method: str) -> float:
        """FLOPs of our step an image. Ends the program where formula and counter disagree."""
        module = ours_with(self.weights, self.setting, method).method
        formula, counted = shape_of(module).flops, flops.per_image(module, _plain, (3, self.size.image, self.size.image))
        if not abs(formula / counted - 1) < COUNTED:
            raise SystemExit(f"FLOPs of {method}: {formula:.4g} by formula, {counted:.4g} by torch's counter")
        print(f"  {method}: {formula / 1e9:.3f} GFLOP an image and step, {100 * (formula / counted - 1):+.2f}% off torch's counter")
        return formula

    @contextmanager
    def _hosts(self) -> Iterator[dict[str, Here | Apart]]:
        """By the name of a side who runs it."""
        with ExitStack() as stack:
            found: list[Here | Apart] = []
            if self.device.type == "cpu":
                file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.pt"
                torch.save(self.weights, file)
                found += [stack.enter_context(closing(Apart(program, file, self.setting))) for program in self.programs]
            else:
                found += [Here(program, self.weights, self.setting) for program in self.programs]
            yield {name: host for host in found for name in host.names()}

    def _turns(self, hosts: dict[str, Here | Apart], repeats: int) -> tuple[dict[str, list[float]], list[float]]:
        """Seconds a step of every side in every turn, and the device's FLOPs a second in every turn."""
        least = SECONDS[self.device.type]
        counts = {name: max(round(least / host.seconds(name, 1)), 1) for name, host in hosts.items()}
        took: dict[str, list[float]] = {name: [] for name in hosts}
        peak = []
        for turn in range(repeats):
            names = list(hosts)[:: 1 if turn % 2 == 0 else -1]  # there and back: nobody always follows the same one
            for name in names:
                took[name].append(hosts[name].seconds(name, counts[name]) / counts[name])
            peak.append(flops.of_device(self.device, DTYPES[self.setting.best]))
            rates = ", ".join(f"{name} {self.batch / seconds[-1]:.4g}" for name, seconds in took.items())
            print(f"  turn {turn + 1}, images/s: {rates}; matrix product {peak[-1] / 1e9:,.0f} GFLOP/s", flush=True)
        return took, peak

    def _figures(
        self, took: dict[str, list[float]], peak: list[float], counted: float, memory: dict[str, float | None]
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
            "lean_ratio": (took.get("ours best"), took.get("lean best")),
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
            mfu = [counted * self.batch / s / p for s, p in zip(best, peak, strict=True)]
            found |= {"mfu": round(statistics.median(mfu), 3), "images_per_second": round(self.batch / statistics.median(best), 2)}
        for key, side in (("memory_ratio", "ours best"), ("lean_memory_ratio", "lean best")):
            mine, other = memory.get(side), memory["textbook"]
            found[key] = round(mine / other, 3) if mine and other else None
        found["batch"] = self.batch
        return found


def prove(weights: dict[str, Tensor], setting: Setting) -> None:
    """Ends the program where one side's loss is not that of the others."""
    ours, theirs = ours_with(weights, setting).method, transformers_with(weights, setting)
    images = setting.images()[:8]
    noise = torch.rand(len(images), setting.size.patches, generator=torch.Generator().manual_seed(1)).to(setting.device)
    with torch.no_grad():
        losses = {
            "transformers": theirs(images, noise=noise).loss,
            "textbook": textbook_with(weights, setting, fused=False)(images, noise),
            "textbook, fused attention": textbook_with(weights, setting, fused=True)(images, noise),
            "ours": type(ours).forward(ours, images, noise=noise).loss,
        }
    values = {name: float(loss) for name, loss in losses.items()}
    apart = (max(values.values()) - min(values.values())) / values["transformers"]
    print("  losses " + ", ".join(f"{name} {value:.7f}" for name, value in values.items()) + f": {apart:.1e} apart", flush=True)
    if not apart < EQUAL:
        raise SystemExit(f"the sides do not compute the same loss: {values}")


def _faster(took: dict[str, list[float]], prefix: str) -> list[float]:
    """The faster of a side's kinds of attention, in every turn."""
    return [min(turn) for turn in zip(*(s for name, s in took.items() if name.startswith(prefix)), strict=True)]


def _plain(method: Autoencoder, images: Tensor, keys: Tensor) -> Output:
    """The loss without torch.compile."""
    return type(method).forward(method, images, keys=keys)
