"""Whole runs under every engine, killed and gone on with, on as many ranks as before or on others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mae

ROOT = Path(__file__).parents[1]
WORDS = ["encoder.embed_dim=32", "encoder.depth=1", "train.log_every=1", "optim.warmup_epochs=0", "optim.name=adamw", "optim.base_lr=1e-3"]
WORDS += ["train.precision=fp32", "train.batch_size=48", "train.steps=60", "train.checkpoint_every=10"]
WORDS += ["train.evaluate_every=30", "evaluate.protocols=[knn]", "evaluate.controls=false", "track.wandb=off", "run.dir=run"]


def command(world, *words):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    return [sys.executable, *launcher, str(ROOT / "pretrain.py"), *WORDS, *words]


def finish(world, cwd, *words):
    done = subprocess.run(
        command(world, *words), cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def rows(cwd):
    file = cwd / "run" / "metrics.jsonl"
    found = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return [[row[name] for name in ("step", "loss", "grad_norm", "batch_hash")] for row in found if "batch_hash" in row]


def kill_after(step, world, cwd, *words):
    """Starts a run in a session of its own and kills all of it once that step is logged."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen(command(world, *words), cwd=cwd, stdout=log, stderr=log, start_new_session=True, env=environment)
    while process.poll() is None and not any(row[0] >= step for row in rows(cwd)):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert rows(cwd)[-1][0] < 60, (cwd / "log").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "engine"), [(2, "fsdp"), (3, "fsdp"), (3, "ddp")])
def test_a_killed_run_ends_bit_identical_under_every_engine(world, engine, tmp_path):
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    finish(world, tmp_path / "straight", f"train.parallel={engine}")
    kill_after(25, world, tmp_path / "killed", f"train.parallel={engine}")
    assert "resuming from" in finish(world, tmp_path / "killed", f"train.parallel={engine}")
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    encoders = [load_file(tmp_path / name / "run" / "encoder" / "model.safetensors") for name in ("straight", "killed")]
    assert encoders[0].keys() == encoders[1].keys()
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])
    loaded = mae.load(tmp_path / "killed" / "run").encoder.state_dict()
    assert all(torch.equal(encoders[0][name], loaded[name]) for name in loaded)


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_another_engine(tmp_path):
    for name in ("straight", "changed"):
        (tmp_path / name).mkdir()
    finish(1, tmp_path / "straight")
    kill_after(15, 2, tmp_path / "changed", "train.parallel=fsdp")
    kill_after(30, 1, tmp_path / "changed")
    kill_after(45, 3, tmp_path / "changed", "train.parallel=fsdp", "run.background=true")
    finish(2, tmp_path / "changed", "train.parallel=ddp")
    one, other = rows(tmp_path / "straight"), rows(tmp_path / "changed")
    assert [row[::3] for row in one] == [row[::3] for row in other]
    assert [row[1] for row in one] == pytest.approx([row[1] for row in other], rel=1e-3)
