"""The Slurm template of docs/cluster.md, run by bash with a scheduler of a few lines in Slurm's place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "docs" / "pretrain.sbatch"
SCONTROL = """#!/bin/bash
case $1 in show) echo localhost ;; requeue) echo "$2" >> requeued ;; esac
"""
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & done
for pid in $(jobs -p); do wait "$pid"; c=$?; ((c > code)) && code=$c; done
exit $code
"""
PYTHON = """#!/bin/bash
echo "$RANK of $WORLD_SIZE at $MASTER_ADDR: $*" >> said
[ -n "$SAYS" ] && echo "{\\"status\\": \\"$SAYS\\"}" > run/status.json
exit $CODE
"""


def slurm(folder, python, **environment):
    """A folder with the commands that the template calls; returns the environment of a job of two tasks on one node."""
    commands = {"scontrol": SCONTROL, "srun": SRUN, "python": python}
    (folder / "bin").mkdir()
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    return {**os.environ, **job, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **environment}


@pytest.mark.parametrize(
    ("before", "says", "code", "again"),
    [
        ("running", "preempted", 75, True),
        ("running", "done", 0, False),
        ("running", "failed", 1, False),
        ("preempted", "", 2, False),  # stopped before it wrote anything: what stands there is old
        ("preempted", "", 137, False),
    ],
)
def test_a_job_goes_back_into_the_queue_when_it_was_preempted_and_only_then(before, says, code, again, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(json.dumps({"status": before}))
    env = slurm(tmp_path, PYTHON, SAYS=says, CODE=str(code))
    done = subprocess.run(["bash", TEMPLATE, "a.yaml", "run.dir=run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == (0 if again else code), done.stderr
    assert (tmp_path / "requeued").exists() == again
    ranks = sorted((tmp_path / "said").read_text().splitlines())
    assert ranks == [f"{rank} of 2 at localhost: pretrain.py a.yaml run.dir=run" for rank in range(2)]


def test_the_template_is_sound_and_asks_for_a_folder(tmp_path):
    subprocess.run(["bash", "-n", TEMPLATE], check=True)
    done = subprocess.run(["bash", TEMPLATE], env=slurm(tmp_path, PYTHON), capture_output=True, text=True)
    assert (done.returncode, "run.dir=FOLDER" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_real_run_is_signalled_requeued_and_finished(tmp_path):
    env = slurm(tmp_path, f'#!/bin/bash\nexec "{sys.executable}" "{ROOT}/$1" "${{@:2}}"\n', OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    words = ["encoder.embed_dim=32", "encoder.depth=1", "train.precision=fp32", "train.log_every=1", "train.steps=600", "run.dir=run"]
    words += ["evaluate.protocols=[]", "evaluate.controls=false", "track.wandb=off"]
    job = subprocess.Popen(["bash", TEMPLATE, *words], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    try:
        while not rows.is_file() or len(rows.read_text().splitlines()) < 20:
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.1)
        for pid in ranks(job.pid):  # as slurmctld does two minutes before the limit
            os.kill(pid, signal.SIGUSR1)
        _, stderr = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "saved: back into the queue" in stderr
    assert (tmp_path / "requeued").read_text() == "1234\n"
    assert subprocess.run(["bash", TEMPLATE, *words], cwd=tmp_path, env=env, timeout=240).returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1


def ranks(job):
    """The Python processes of a job's session that run pretrain.py."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--sid", str(job)], capture_output=True, text=True).stdout
    found = [line.split(None, 1) for line in listed.splitlines()]
    return [int(pid) for pid, command in found if "pretrain.py" in command and command.startswith(sys.executable)]
