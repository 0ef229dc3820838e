"""W&B may hang or die: neither the run nor its end waits for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae.training.tracking import mode

MIRROR = """
import os, signal, sys, time
from pathlib import Path
from mae import config
from mae.training.tracking import Tracker
tracker = Tracker(config.load(["track.wandb=offline"]), Path("."), "pretrain", name="run", derived={})
tracker.log({"step": 1, "loss": 1.0})
tracker.alert("loss spike", "it leapt")
deadline = time.monotonic() + 60
while not list(Path("wandb").glob("offline-run-*/*.wandb")):
    assert time.monotonic() < deadline
    time.sleep(0.1)
time.sleep(1)
for children in Path("/proc/self/task").glob("*/children"):
    for pid in children.read_text().split():
        if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), getattr(signal, sys.argv[1]))
began = time.monotonic()
for step in range(20_000):
    tracker.log({"step": step, "loss": 1.0})
print("logging", time.monotonic() - began)
began = time.monotonic()
tracker.finish()
print("finishing", time.monotonic() - began)
"""


def test_a_key_is_one_for_the_server_that_is_configured_and_modes_have_their_old_names_too(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mode("auto") == "off"
    (tmp_path / ".netrc").write_text("machine wandb.example.org:8080 login user password k")
    assert mode("auto") == "off"  # that is no key of api.wandb.ai
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert mode("auto") == "online"
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / ".config/wandb").mkdir(parents=True)
    (tmp_path / ".config/wandb/settings").write_text("[default]\nbase_url = https://wandb.example.org:8080\n")  # `wandb login --host`
    assert mode("auto") == "online"
    for said, meant in {"dryrun": "offline", "offline": "offline", "disabled": "off", "run": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", said)
        assert (mode("auto"), mode("off")) == (meant, "off")


@pytest.mark.parametrize("fault", ["SIGSTOP", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_a_wandb_process_that_hangs_or_dies_holds_up_neither_the_run_nor_its_end(fault, tmp_path):
    env = {**os.environ, "WANDB_FINISH_TIMEOUT": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    env.pop("WANDB_SERVICE", None)  # of a test before this one in the same process: W&B would use its server in place of one of its own
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MIRROR, fault], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 100
    assert done.returncode == 0, done.stderr
    took = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("logging", "finishing")))
    assert float(took["logging"]) < 5
    assert float(took["finishing"]) < 20
    assert "W&B" in done.stderr
    assert "Traceback" not in done.stderr
