"""Two network namespaces as two hosts: what holds between machines, and what happens when the cable is pulled."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS, TIMEOUT = 400, 0.2  # minutes
WORDS = ["encoder.embed_dim=32", "encoder.depth=1", "train.precision=fp32", "train.log_every=1", "evaluate.protocols=[]"]
WORDS += ["evaluate.controls=false", "track.wandb=off", "run.dir=run", f"train.steps={STEPS}", "train.checkpoint_every=10"]
WORDS += [f"train.timeout={TIMEOUT}"]


class Hosts:
    """Two network namespaces joined by one cable."""

    def __init__(self):
        self.names = [f"mae{os.getpid()}{side}" for side in "ab"]
        self.cables = [f"m{os.getpid()}{side}" for side in "ab"]
        self.started = []

    def build(self):
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for i, (name, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", cable)
            for link in (cable, "lo"):
                ip("-n", name, "link", "set", link, "up")

    def cable(self, state):
        ip("-n", self.names[0], "link", "set", self.cables[0], state)

    def torchrun(self, folders, words):
        """The same command on both, each in its folder; returns the two launchers."""
        launchers = []
        for i, (name, cable, folder) in enumerate(zip(self.names, self.cables, folders, strict=True)):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1"]
            launcher += ["--master-addr=10.77.0.1", "--master-port=29400", str(ROOT / "pretrain.py"), *words]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": cable}
            with open(folder / f"host{i}.log", "w") as log:
                launchers.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, *launcher], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
                    )
                )
        self.started += launchers
        return launchers

    def remove(self):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in self.names:  # a rank that outlives its launcher is in a session of its own
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in map(int, found.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def hosts():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces take root and the `ip` command")
    made = Hosts()
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def rows(folder):
    file = folder / "run" / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):  # the last line, while it is written
            found.append(json.loads(line))
    return [row for row in found if "loss" in row]


def logs(folder):
    return [(folder / f"host{i}.log").read_text() for i in range(2)]


@pytest.mark.slow
def test_two_hosts_train_as_one_process_and_a_pulled_cable_ends_both_in_time_and_loses_nothing(hosts, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
    done = subprocess.run([sys.executable, ROOT / "pretrain.py", *WORDS], cwd=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    launchers = hosts.torchrun([both, both], WORDS)
    deadline = time.monotonic() + 180
    while len(rows(both)) < 25:
        assert time.monotonic() < deadline, logs(both)
        assert all(process.poll() is None for process in launchers), logs(both)
        time.sleep(0.05)
    hosts.cable("down")
    pulled = time.monotonic()
    for process in launchers:
        assert process.wait(timeout=120) == 1
    assert time.monotonic() - pulled < 60 * TIMEOUT + 10
    for rank, log in enumerate(logs(both)):
        assert f"mae: rank {rank} on " in log
        assert "lost contact with the others" in log
        assert f"train.timeout = {TIMEOUT} minutes" in log
    assert json.loads((both / "run" / "status.json").read_text())["status"] == "failed"
    assert 25 <= len(rows(both)) < STEPS, "the cable was pulled too late to show anything"

    hosts.cable("up")
    for process in hosts.torchrun([both, both], WORDS):
        assert process.wait(timeout=240) == 0, logs(both)
    assert "resuming from" in logs(both)[0]
    one, two = rows(alone), rows(both)
    assert [(r["step"], r["batch_hash"]) for r in two] == [(r["step"], r["batch_hash"]) for r in one]
    losses = [[r["loss"] for r in each] for each in (two, one)]
    assert losses[0][:100] == pytest.approx(losses[1][:100], rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # rounding in another order grows with the steps


@pytest.mark.slow
def test_hosts_that_do_not_share_the_run_folder_are_told_so(hosts, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    for process in hosts.torchrun(folders, [*WORDS, "train.timeout=1"]):
        assert process.wait(timeout=180) == 1  # torchrun's; the ranks' own is 2
    log = (folders[0] / "host0.log").read_text()
    assert "not every host sees the run folder run: choose a run.dir=... on a file system that all of them share" in log
    assert "exitcode  : 2" in log
    assert rows(folders[0]) == []
