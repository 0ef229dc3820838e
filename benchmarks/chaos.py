"""What is lost when a run is killed, told to stop, moved to other ranks, or finds its checkpoints damaged? The answer is to be: nothing.

    python benchmarks/chaos.py [--quick] [--only kills,save_points,worlds,signals,flips,cost]

Every fault is real: processes of the program itself under torchrun, SIGKILL at random moments (seeded), calls of the operating system that
strace lets fail, flipped bytes on disk. Takes about 40 minutes on 2 cores, most of it spent importing; --quick has fewer of each kind.
"""

import argparse
import contextlib
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import chaos_runs
import faults
import torch
from chaos_runs import Place
from processes import ROOT, shared_memory

sys.path.insert(0, str(ROOT))

import mae
from mae import config
from mae.keys import Run
from mae.training import checkpoint, optim, state
from mae.training.distributed import Ranks
from mae.training.run import RunFolder
from mae.training.saving import Saver

FLIPS = 250  # a file
SAVED = {"model.x": 64, "optimizer.x.exp_avg": 64}


def main() -> int:
    """Prints what each part finds and, last, all figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 kills and 4 signals, within 5 minutes on 2 cores")
    parser.add_argument("--only", default=",".join(PARTS), help="some parts: " + ",".join(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the runs where they are, to look at them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no run behind
    place = Place(Path(tempfile.mkdtemp(prefix="chaos-")), options.quick, options.seed)
    print(f"runs in {place.work}, seed {options.seed}", flush=True)
    chaos_runs.make_images(place.work)
    logging.getLogger("mae").setLevel(logging.ERROR)  # of every damaged checkpoint it would say so
    before, figures, began = shared_memory(), dict.fromkeys(KEYS), time.monotonic()
    for name in options.only.split(","):
        part = time.monotonic()
        print(f"{name}: {PARTS[name].__doc__.splitlines()[0]}", flush=True)
        found = PARTS[name](place)
        figures |= found
        print(f"  {', '.join(f'{k} {v}' for k, v in found.items())} ({time.monotonic() - part:.0f} s)", flush=True)
    figures |= {"hangs": place.hangs, "orphans": place.orphans, "leaked": len(shared_memory() - before)}
    figures["first_step_seconds"] = chaos_runs.median(place.first_steps)
    if not options.keep:
        shutil.rmtree(place.work)
    device = "cpu"  # a kill is a kill, whatever computes the gradients
    print(
        json.dumps({"benchmark": "chaos", "device": device, **figures, "quick": options.quick, "seconds": round(time.monotonic() - began)})
    )
    return 0


def save_points(place: Place) -> dict:
    """A kill at every write, sync and rename of a save, which follows one that was committed."""
    if problem := faults.unavailable():
        print(f"  not done: {problem}")
        return {}
    base, folder, loadable, lost = place.work / "base", place.work / "saves", 0, 0
    _save(base, 1)
    shutil.copytree(base, folder)
    points = faults.points(lambda: _save(folder, 2))
    for call, number in points:
        shutil.rmtree(folder)
        shutil.copytree(base, folder)
        code, _ = faults.traced(lambda: _save(folder, 2), f"{call}:signal=KILL:when={number}")
        found = checkpoint.load_newest(folder)
        checkpoint.sweep(folder)
        loadable += code == -9 and found is not None and not list(folder.glob("*.tmp-*"))
        lost = max(lost, 2 - found[2]["step"] if found else 2)
    return {"save_points": len(points), "loadable": loadable, "intervals_lost": lost}


def _save(folder: Path, step: int) -> None:
    tensors = {name: torch.full((size,), float(step)) for name, size in SAVED.items()}
    checkpoint.save(folder, step, tensors, {"step": step}, facts={}, keep=2)


def flips(place: Place) -> dict:
    """One byte changed, anywhere in any file of a checkpoint."""
    rng, folder, flipped, detected = random.Random(place.seed), place.work / "flips", 0, 0
    _save(folder, 1)
    for file in sorted((folder / "step-00000001").iterdir()):
        whole = file.read_bytes()
        for at in rng.sample(range(len(whole)), min(FLIPS, len(whole))):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :])
            flipped += 1
            detected += checkpoint.newest(folder) is None
        file.write_bytes(whole)
    assert checkpoint.newest(folder) is not None
    return {"flips": flipped, "detected": detected}


def cost(place: Place) -> dict:
    """How long a step is held up by a checkpoint that is written before the training goes on, or behind it."""
    width, saves = (96, 3) if place.quick else (384, 8)
    words = [f"encoder.embed_dim={width}", "encoder.depth=4", f"encoder.num_heads={width // 32}"]
    method = mae.create(words).train()
    optimizer = optim.create(method, config.load([*words, "optim.name=adamw"]).optim)
    images, keys = torch.randn(64, 1, 8, 8), torch.arange(64)

    def step() -> None:
        """One update."""
        optimizer.zero_grad()
        method(images, keys=keys).loss.backward()
        optimizer.step()

    found = {}
    for name, every in (("none", 0), ("foreground", 1), ("background", 1)):
        folder = RunFolder(place.work / "cost" / name)
        folder.path.mkdir(parents=True)
        facts = {"config": "", "data": ""}
        with Saver(folder, Run(background=name == "background"), Ranks(0, 1, torch.device("cpu")), facts) as saver:
            step()
            began = time.perf_counter()
            for number in range(saves * 10):
                step()
                if every and number % 10 == 0:
                    saver.save(number, *state.take(method, optimizer, None), samples=number)
            found[name] = time.perf_counter() - began
    size = sum(f.stat().st_size for f in (folder.checkpoints / f"step-{saves * 10 - 10:08d}").iterdir()) / 2**20
    one = found["none"] / saves / 10
    print(f"  a step of {one * 1e3:.0f} ms, a checkpoint of {size:.0f} MiB every 10 steps", flush=True)
    held = {name: round((found[name] - found["none"]) / saves, 4) for name in ("foreground", "background")}
    return {f"checkpoint_{name}_seconds": seconds for name, seconds in held.items()} | {"checkpoint_mib": round(size, 1)}


PARTS = {
    "save_points": save_points,
    "flips": flips,
    "cost": cost,
    "kills": chaos_runs.kills,
    "worlds": chaos_runs.worlds,
    "signals": chaos_runs.signals,
}
KEYS = ["kills", "identical", "lost", "repeated", "save_points", "loadable", "signals", "saved", "flips", "detected"]
KEYS += ["during_saves", "intervals_lost", "signal_steps_repeated", "world_steps", "world_same_batches", "world_loss_difference"]
KEYS += ["checkpoint_foreground_seconds", "checkpoint_background_seconds", "checkpoint_mib"]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
