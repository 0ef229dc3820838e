"""Checkpoints under real faults: flipped bytes, full disks, forbidden folders, a kill or an error at every call that writes."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
from pathlib import Path

import faults
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mae import config
from mae.commands import pretrain
from mae.errors import CannotSave, ConfigError
from mae.keys import Run
from mae.training import checkpoint
from mae.training.distributed import Ranks
from mae.training.run import RunFolder, fingerprint
from mae.training.saving import Saver

ONE = Ranks(0, 1, torch.device("cpu"))
SCALARS = {"progress": {"step": 1}}
FACTS = {"config": "c", "data": "d", "world": 2, "samples": 96}


def save(folder, step, size=64, **kept):
    return checkpoint.save(folder, step, {"model.x": torch.full((size,), float(step))}, SCALARS, facts=FACTS, **({"keep": 2} | kept))


def value(folder):
    return float(checkpoint.load_newest(folder)[1]["model.x"][0])


def leftovers(folder):
    return [p.name for p in folder.rglob("*.tmp-*")]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES_SECONDS", (0.0, 0.0))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    file=st.sampled_from(["state.safetensors", "state.json", "manifest.json"]),
)
def test_one_flipped_bit_anywhere_in_a_checkpoint_is_noticed_and_the_one_before_is_taken(tmp_path, place, bit, file):
    if not (tmp_path / "step-00000002").exists():
        save(tmp_path, 1), save(tmp_path, 2)
    damaged = tmp_path / "step-00000002" / file
    whole = damaged.read_bytes()
    at = int(place * len(whole))
    damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        assert checkpoint.verify(damaged.parent) is not None
        assert value(tmp_path) == 1
    finally:
        damaged.write_bytes(whole)
    assert value(tmp_path) == 2


def test_a_cut_or_missing_file_is_noticed(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    for file in list((tmp_path / "step-00000002").iterdir()):
        whole = file.read_bytes()
        for rest in (None, b"", whole[:-1], whole + b"\n"):
            file.unlink() if rest is None else file.write_bytes(rest)
            assert value(tmp_path) == 1
            file.write_bytes(whole)
    assert value(tmp_path) == 2


def test_a_manifest_says_what_was_saved_and_where_it_belongs(tmp_path):
    said = checkpoint.manifest(save(tmp_path, 7))
    assert {k: v for k, v in said.items() if k != "files"} == {"step": 7, **FACTS}
    for name, facts in said["files"].items():
        assert facts["size"] == (tmp_path / "step-00000007" / name).stat().st_size
        assert len(facts["sha256"]) == 64


def test_the_newest_and_every_mth_are_kept_and_a_damaged_later_one_costs_no_good_one(tmp_path):
    for step in range(10, 101, 10):
        save(tmp_path, step, keep=2, keep_every=40)
    assert checkpoint.steps(tmp_path) == [40, 80, 90, 100]
    (tmp_path / "step-00000100" / "state.json").write_text("{}")
    assert value(tmp_path) == 90
    save(tmp_path, 95, keep=1)
    assert checkpoint.steps(tmp_path) == [95, 100]  # 40 and 80 are no longer asked for; 100 is nobody's yet
    assert value(tmp_path) == 95
    save(tmp_path, 100, keep=2)
    assert value(tmp_path) == 100
    assert not leftovers(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoints_no_rubbish_and_a_true_status(small_disk, impatient):
    folder = RunFolder(small_disk / "run")
    folder.create(config.load([]), {})
    folder.status("running")
    folder.append({"step": 1, "loss": 0.5})
    save(folder.checkpoints, 1, size=1000)
    with pytest.raises(CannotSave, match=r"step 2 .*No space left on device.*the ones before it are as they were"):
        save(folder.checkpoints, 2, size=1_000_000)
    assert checkpoint.steps(folder.checkpoints) == [1]
    with open(small_disk / "others", "wb", buffering=0) as others, contextlib.suppress(OSError):
        while others.write(bytes(1 << 12)):  # until there is not a byte to spare
            continue
    for step in range(2, 200):
        folder.append({"step": step, "loss": 1 / step, "filler": "x" * 50})  # ends nothing
    folder.status("failed", reason="No space left on device: " + "why " * 20)
    assert json.loads((folder.path / "status.json").read_text())["status"] == "failed"
    assert value(folder.checkpoints) == 1
    assert not leftovers(folder.path)
    assert [row["step"] for row in folder.rows()] == list(range(1, len(folder.rows()) + 1))
    assert len(folder.rows()) < 199
    (small_disk / "others").unlink()
    save(folder.checkpoints, 3)
    folder.flush()
    assert [row["step"] for row in folder.rows()] == list(range(1, 200))


def test_a_limit_on_file_sizes_is_met_as_a_full_disk_is(tmp_path, impatient):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CannotSave, match="File too large"):
            save(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]


def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(small_disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = [f"run.dir={small_disk}/run", "track.wandb=off", "encoder.depth=1", "encoder.embed_dim=32"]
    assert pretrain.main(words) == 2
    said = capfd.readouterr().err
    assert said.splitlines()[-1].startswith(f"mae: run.dir {small_disk}/run cannot be written to (Read-only file system)")


def test_a_background_save_keeps_what_the_tensors_were_and_waits_its_turn(tmp_path):
    tensors = {"model.x": torch.arange(100_000.0), "optimizer.x.exp_avg": torch.ones(3)}
    expected = {k: v.clone() for k, v in tensors.items()}
    for name in ("behind", "ahead"):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        with Saver(folder, Run(background=name == "behind", keep=3), ONE, {"config": "c", "data": "d"}) as saver:
            for step in (1, 2, 3):
                saver.save(step, tensors, SCALARS, samples=step)
                for tensor in tensors.values():
                    tensor.add_(1)  # as the next step does, while the thread writes
            tensors = {k: v.clone() for k, v in expected.items()}
        assert not leftovers(folder.path)
    for step in (1, 2, 3):
        ours, theirs = (checkpoint.path_of(tmp_path / name / "checkpoints", step) for name in ("behind", "ahead"))
        assert checkpoint.manifest(ours) == checkpoint.manifest(theirs)
        assert torch.equal(checkpoint.load(ours)[0]["model.x"], expected["model.x"] + step - 1)


def test_an_error_behind_the_training_comes_up_at_the_next_save_or_at_the_end(tmp_path, impatient):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.checkpoints.write_text("in the way")
    saver = Saver(folder, Run(background=True), ONE, {"config": "c", "data": "d"})
    saver.save(1, {"model.x": torch.ones(1)}, SCALARS, samples=1)
    with pytest.raises(CannotSave), saver:
        saver.save(2, {"model.x": torch.ones(1)}, SCALARS, samples=1)
    with pytest.raises(CannotSave), Saver(folder, Run(background=True), ONE, {}) as saver:
        saver.save(3, {"model.x": torch.ones(1)}, SCALARS, samples=1)


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    folder = RunFolder(tmp_path)
    save(folder.checkpoints, 1)
    assert Saver(folder, Run(), ONE, FACTS).find() is not None
    with pytest.raises(ConfigError, match="its data is d, not e"):
        Saver(folder, Run(), ONE, {**FACTS, "data": "e"}).find()


def test_how_a_run_is_done_is_no_part_of_its_fingerprint():
    one = fingerprint(config.load([]))
    assert one == fingerprint(config.load(["data.workers=3", "run.keep=7", "run.background=true", "train.checkpoint_every=3"]))
    assert one != fingerprint(config.load(["train.batch_size=128"]))


def test_a_start_that_was_killed_before_its_first_file_is_no_obstacle(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        (folder.path / "config.yaml.tmp-0abc").write_text("data:")
        folder.check(config.load([]))
        folder.create(config.load([]), {})
    assert not leftovers(folder.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds other things"):
        RunFolder(tmp_path / "other").check(config.load([]))


def _on_three_ranks(rank, folder):
    """Writes what the rank finds where rank 2 alone reads a damaged newest checkpoint, and what it raises where rank 0 cannot save."""
    torch.set_num_threads(1)
    if rank == 2:  # a view of the files of its own
        damaged = shutil.copy(folder / "checkpoints/step-00000003/state.json", folder / "damaged")
        Path(damaged).write_text("{")
        if ctypes.CDLL(None).unshare(0x20000):  # CLONE_NEWNS
            os._exit(77)
        for words in (["--make-rprivate", "/"], ["--bind", damaged, str(folder / "checkpoints/step-00000003/state.json")]):
            subprocess.run(["mount", *words], check=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    ranks, run = Ranks(rank, 3, torch.device("cpu")), RunFolder(folder)
    found = Saver(run, Run(), ranks, FACTS).find()
    checkpoint.PAUSES_SECONDS = ()
    run.checkpoints = folder / "damaged" / "no folder"
    raised = None
    try:
        Saver(run, Run(), ranks, FACTS).save(9, {"model.x": torch.ones(1)}, {}, samples=1)
    except CannotSave as error:
        raised = type(error).__name__
    (folder / f"rank-{rank}").write_text(f"{found.name} {raised}")
    dist.destroy_process_group()
    os._exit(0)


def test_ranks_go_back_to_the_same_checkpoint_and_fail_together(tmp_path):
    if os.geteuid():
        pytest.skip("only root can show a process other files than the rest")
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step, keep=3)
    ranks = [multiprocessing.get_context("fork").Process(target=_on_three_ranks, args=(rank, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    if ranks[2].exitcode == 77:
        pytest.skip("this machine gives no process files of its own")
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)] == ["step-00000002 CannotSave"] * 3
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000003"  # which only rank 2 saw otherwise


@pytest.fixture(scope="module")
def strace():
    if problem := faults.unavailable():
        pytest.skip(problem)


def test_a_kill_at_every_write_sync_and_rename_leaves_a_checkpoint_to_go_on_from(tmp_path, strace):
    save(tmp_path / "base", 1)
    shutil.copytree(tmp_path / "base", tmp_path / "run")
    points = faults.points(lambda: save(tmp_path / "run", 2))
    assert {"fsync"} < {call for call, _ in points}
    assert len(points) >= 8
    seen = set()
    for call, number in points:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "base", tmp_path / "run")
        code, _ = faults.traced(lambda: save(tmp_path / "run", 2), f"{call}:signal=KILL:when={number}")
        assert code == -9, (call, number)
        seen.add(value(tmp_path / "run"))
        checkpoint.sweep(tmp_path / "run")
        assert not leftovers(tmp_path / "run")
        save(tmp_path / "run", 2)
        assert value(tmp_path / "run") == 2
    assert seen == {1, 2}  # before and after the rename


def test_an_error_at_any_call_is_tried_again_and_one_that_stays_leaves_no_trace(tmp_path, strace, impatient):
    save(tmp_path / "base", 1)
    shutil.copytree(tmp_path / "base", tmp_path / "run")
    for call, number in faults.points(lambda: save(tmp_path / "run", 2)):
        for when, code in ((f"{number}", 0), (f"{number}+", 1)):
            shutil.rmtree(tmp_path / "run")
            shutil.copytree(tmp_path / "base", tmp_path / "run")
            ended, _ = faults.traced(lambda: save(tmp_path / "run", 2), f"{call}:error={'EIO' if 'sync' in call else 'ENOSPC'}:when={when}")
            assert ended == code, (call, when)
            assert value(tmp_path / "run") in ((2,) if code == 0 else (1, 2)), (call, when)
            assert not leftovers(tmp_path / "run")
