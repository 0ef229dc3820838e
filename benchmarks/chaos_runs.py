"""The parts of benchmarks/chaos.py that run the program itself: SIGKILLs, changing numbers of ranks, signals."""

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from processes import TINY, Hang, Started, last_step, newest_checkpoint, rows, state, status

BATCH, EVERY = 96, 6  # images a step, steps between checkpoints
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass
class Place:
    """Where the parts work, and what they find out about processes that should not be there."""

    work: Path
    quick: bool
    seed: int
    hangs: int = 0
    orphans: int = 0
    first_steps: list[float] = field(default_factory=list)  # seconds from the command to the first new step

    def folder(self, name: str) -> Path:
        """A run folder in a directory of its own."""
        (self.work / name).mkdir(parents=True)
        return self.work / name / "run"

    def words(self, source: str, *more: str) -> list[str]:
        """The configuration of a run on `source` (folder or shards)."""
        sizes = ["data.image_size=16", "encoder.name=vit_tiny_patch16_224", "encoder.patch_size=4", "encoder.num_heads=2"]
        own = [f"train.batch_size={BATCH}", f"train.checkpoint_every={EVERY}", "optim.warmup_epochs=0"]
        return [f"configs/data/{source}.yaml", f"data.path={self.work / source}", *TINY, *sizes, *own, *more]

    @contextlib.contextmanager
    def watched(self, started: Started) -> Iterator[None]:
        """Counts a hang, and what is still there after the run has ended."""
        try:
            yield
        except Hang as hang:
            self.hangs += 1
            print(f"  HANG: {hang}", flush=True)
        finally:
            if left := started.orphans():
                self.orphans += len(left)
                print(f"  ORPHANS: {left}", flush=True)


def make_images(work: Path, count: int = 300) -> None:
    """The same small pictures as files in folder/ and as tar shards in shards/."""
    rng = np.random.default_rng(0)
    for name in ("folder", "shards"):
        (work / name).mkdir()
    for i in range(count):
        low = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((20, 20))
        low.save(work / "folder" / f"{i:04d}.png")
    for shard, start in enumerate(range(0, count, 100)):
        with tarfile.open(work / "shards" / f"images-{shard:03d}.tar", "w") as tar:
            for i in range(start, min(start + 100, count)):
                tar.add(work / "folder" / f"{i:04d}.png", arcname=f"{i:04d}.png")


def kills(place: Place) -> dict:
    """Random SIGKILLs during steps and saves, to a rank (the launcher starts all again) or to everything (the same command again)."""
    plan = [(2, "folder", 4)] if place.quick else [(2, "folder", 9), (2, "shards", 9), (4, "folder", 6), (4, "shards", 6)]
    found: Counter[str] = Counter()
    for ranks, source, count in plan:
        how = [f"data.workers={0 if place.quick else 2}", f"run.background={str(source == 'shards').lower()}"]
        words = place.words(source, f"train.steps={30 * (count + 1)}", *how)
        reference = place.folder(f"kills-{ranks}-{source}-reference")
        straight = Started(reference, words, ranks=ranks)
        with place.watched(straight):
            straight.wait()
        found += _killed(place, place.folder(f"kills-{ranks}-{source}"), reference, words, ranks, count)
    return {k: found[k] for k in ("kills", "during_saves", "identical", "lost", "repeated")}


def _killed(place: Place, folder: Path, reference: Path, words: list[str], ranks: int, count: int) -> Counter[str]:
    rng, found = random.Random(f"{place.seed} {folder.parent.name}"), Counter[str]()
    while status(folder).get("status") != "done" and found["starts"] <= count:
        found["starts"] += 1
        started = Started(folder, words, ranks=ranks, restarts=count)
        with place.watched(started):
            place.first_steps.append(started.wait_for_new_step())
            while found["kills"] < count:
                started.wait_for_step(30 * (found["kills"] + 1) - rng.randrange(20))
                if rng.random() < 0.5:
                    found["during_saves"] += _in_a_save(folder)
                else:
                    time.sleep(rng.random() * 0.1)
                found["kills"] += 1
                if rng.random() < 0.5:
                    started.kill_all()
                    break
                os.kill(rng.choice(started.rank_pids()), signal.SIGKILL)
            started.wait()
    print(f"  {ranks} ranks, {folder.parent.name}: {dict(found)}", flush=True)
    mine, theirs = state(folder), state(reference)
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    found["identical"] = found["kills"] * (
        same and [r["loss"] for r in rows(folder).values()] == [r["loss"] for r in rows(reference).values()]
    )
    wanted, got = ([(r["step"], r["batch_hash"]) for r in _training_rows(f)] for f in (reference, folder))
    found["lost"] = BATCH * sum((Counter(wanted) - Counter(got)).values())
    found["repeated"] = BATCH * sum((Counter(got) - Counter(wanted)).values())
    return found


def _in_a_save(folder: Path, seconds: float = 10) -> bool:
    """Waits until a checkpoint is being written; whether one was."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if any(".tmp-" in name for name in os.listdir(folder / "checkpoints")):
                return True
        time.sleep(0.0005)
    return False


def _training_rows(folder: Path) -> list[dict]:
    """Every row of a step, also those that stand twice."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if "batch_hash" in row]


def worlds(place: Place) -> dict:
    """2 ranks, then 1, 3 and 2 again, each with other workers, from where the last one was killed; beside each, one process."""
    found: Counter[str] = Counter()
    largest, folder = 0.0, place.folder("worlds")
    words = place.words("folder", "train.steps=1000")
    for leg, (ranks, workers) in enumerate([(2, 1), (1, 0), (3, 2), (2, 3)]):
        beside = place.folder(f"worlds-{leg}-alone")
        if folder.exists():
            shutil.copytree(folder, beside)
        begun = newest_checkpoint(folder)
        pair = [
            Started(folder, [*words, f"data.workers={workers}"], ranks=ranks),
            Started(beside, [*words, "data.workers=0"], ranks=1),
        ]
        for started in pair:
            with place.watched(started):
                started.wait_for_new_step()
                started.wait_for_step(begun + 25)
                started.kill_all()
        ours, alone = rows(folder), rows(beside)
        steps = range(begun + 1, begun + 26)
        found["steps"] += len(steps)
        found["same_batches"] += sum(step in ours and ours[step]["batch_hash"] == alone[step]["batch_hash"] for step in steps)
        apart = max(abs(ours[step]["loss"] / alone[step]["loss"] - 1) for step in steps[:20])
        largest = max(largest, apart)
        print(f"  {ranks} ranks, {workers} workers from step {begun}: losses {apart:.1e} apart from one process's", flush=True)
    return {"world_steps": found["steps"], "world_same_batches": found["same_batches"], "world_loss_difference": largest}


def signals(place: Place) -> dict:
    """Signals at random moments to a run on 2 ranks with workers, which evaluates now and then; each time the same command again."""
    rng, folder = random.Random(f"{place.seed} signals"), place.folder("signals")
    words = place.words("folder", "train.steps=100000", "train.evaluate_every=10")
    kinds = [("SIGTERM", "launcher"), ("SIGTERM", "rank"), ("SIGTERM", "group"), ("SIGUSR1", "rank")]
    found: Counter[str] = Counter()
    for number in range(4 if place.quick else 60):
        name, to = kinds[number % 4]
        started = Started(folder, [*words, f"data.workers={1 + number % 3}"], ranks=2, options=[f"--signals-to-handle={FORWARDED}"])
        with place.watched(started):
            place.first_steps.append(started.wait_for_new_step())
            time.sleep(rng.random())
            pids = started.rank_pids()
            if to == "group":  # a rank and its workers
                os.killpg(rng.choice(pids), getattr(signal, name))
            else:
                os.kill(started.launcher.pid if to == "launcher" else rng.choice(pids), getattr(signal, name))
            asked = last_step(folder)
            started.wait(60)
            good = {
                "exit 75": started.exit_codes() == [75, 75],
                "preempted": status(folder).get("status") == "preempted",
                "saved where it stopped": newest_checkpoint(folder) == last_step(folder),
                "at once": last_step(folder) <= asked + 3,
                "no traceback": 'rank.py", line' not in started.said(),
            }
            found["signals"] += 1
            found["saved"] += all(good.values())
            if not all(good.values()):
                missing = [k for k, v in good.items() if not v]
                print(f"  {name} to {to}: not {missing}; {started.exit_codes()}\n{started.said()[-3000:]}", flush=True)
    batches = [r["step"] for r in _training_rows(folder)]
    found["signal_steps_repeated"] = len(batches) - len(set(batches)) + (batches != list(range(1, len(batches) + 1)))
    return dict(found)


def median(values: list[float]) -> float | None:
    """Of what there is, else None."""
    return round(statistics.median(values), 2) if values else None
