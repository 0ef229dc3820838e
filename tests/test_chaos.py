"""Whole runs that are killed, told to stop, moved and starved of disk: `pytest -m chaos`, about 6 minutes on 2 calm cores.

The whole of it, with as many faults as a claim needs, is benchmarks/chaos.py.
"""

import contextlib
import json
import os
import signal
import subprocess

import chaos_runs
import pytest
from processes import TINY, Started, last_step, newest_checkpoint, rows, shared_memory, status

pytestmark = pytest.mark.chaos


@pytest.fixture
def place(tmp_path):
    place = chaos_runs.Place(tmp_path, quick=True, seed=1)
    chaos_runs.make_images(tmp_path)
    before = shared_memory()
    yield place
    assert (place.hangs, place.orphans) == (0, 0)
    assert not shared_memory() - before


def test_sigkills_leave_no_trace_in_what_comes_out(place):
    found = chaos_runs.kills(place)
    assert found["kills"] == found["identical"] == 4
    assert found["lost"] == found["repeated"] == 0


def test_any_number_of_ranks_and_workers_goes_on_with_the_same_batches(place):
    found = chaos_runs.worlds(place)
    assert found["world_steps"] == found["world_same_batches"]
    assert found["world_loss_difference"] < 1e-5


def test_signals_to_launcher_rank_and_group_save_at_one_common_step(place):
    found = chaos_runs.signals(place)
    assert found["signals"] == found["saved"] == 4
    assert found["signal_steps_repeated"] == 0


def test_ranks_that_lose_their_launcher_save_and_end(place):
    folder = place.folder("lost")
    started = Started(folder, place.words("folder", "train.steps=100000", "data.workers=1"), ranks=2)
    with place.watched(started):
        started.wait_for_new_step()
        os.kill(started.launcher.pid, signal.SIGKILL)
        started.wait()
        assert not started.orphans(60)
    assert started.exit_codes() == [75, 75]
    assert status(folder)["status"] == "preempted"
    assert newest_checkpoint(folder) == last_step(folder)


def test_a_stop_while_evaluating_keeps_the_training_and_the_same_command_finishes(place):
    folder = place.folder("evaluating")
    words = ["train.steps=20", *TINY, "evaluate.protocols=[knn,linear_probe_quick]"]
    started = Started(folder, words)
    with place.watched(started):
        started.wait_for_step(20)
        while not (folder / "checkpoints" / "step-00000020").exists():
            assert started.launcher.poll() is None
        os.kill(started.launcher.pid, signal.SIGTERM)
        assert started.wait() == 75
    assert status(folder)["status"] == "preempted"
    assert not (folder / "results.json").exists()
    again = Started(folder, words)
    with place.watched(again):
        assert again.wait() == 0
    assert status(folder)["status"] == "done"
    assert json.loads((folder / "results.json").read_text())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_stops_all_ranks_with_one_sentence_and_nothing_is_lost(place, small_disk):
    words = place.words("folder", "train.steps=60")
    straight, folder = place.folder("straight"), small_disk / "run"
    with place.watched(reference := Started(straight, words, ranks=2)):
        assert reference.wait() == 0
    (place.work / "full").mkdir()
    started = Started(folder, words, ranks=2, beside=place.work / "full")
    with place.watched(started):
        started.wait_for_step(13)
        with open(small_disk / "others", "wb", buffering=0) as others, contextlib.suppress(OSError):
            while others.write(bytes(1 << 12)):
                continue
        assert started.wait() == 1
    assert started.exit_codes() == [1, 1]
    said = [line for line in started.said().splitlines() if line.startswith("mae: ")]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert 'rank.py", line' not in started.said()
    assert status(folder)["status"] == "failed"
    (small_disk / "others").unlink()
    with place.watched(again := Started(folder, words, ranks=2, beside=place.work / "full")):
        assert again.wait() == 0
    keep = ("step", "loss", "batch_hash")
    assert [[r[k] for k in keep] for r in rows(folder).values()] == [[r[k] for k in keep] for r in rows(straight).values()]
