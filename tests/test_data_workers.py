"""Reading processes live exactly as long as the main one: signals to all of them do not end them, its death does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

MAIN = """
import os, signal, sys
import torch
from mae import config
from mae.data.loader import train_batches
from mae.data.sources import open_splits

if __name__ == "__main__":
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda *_: None)
    c = config.load(["data.name=folder", "data.path=" + sys.argv[1], "data.image_size=32", "data.workers=2", "train.batch_size=4"])
    batches = train_batches(open_splits(c.data).train, c, first_step=0, device=torch.device("cpu"))
    next(batches)
    for name in ("SIGTERM", "SIGINT", "SIGTERM"):
        os.killpg(os.getpgrp(), getattr(signal, name))
    for _ in range(12):  # more than was fetched ahead
        next(batches)
    print("alive", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    # else: the interpreter exits with the iterator alive
"""


def members(group):
    """Process ids of a process group, read from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["killed", "leaves"])
def test_workers_outlive_signals_and_never_their_main_process(tmp_path, end):
    for i in range(12):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen([sys.executable, script, tmp_path, end], stdout=subprocess.PIPE, start_new_session=True, env=environment)
    try:
        output = process.communicate(timeout=120)[0]  # until the last of them has closed it
        assert output == b"alive\n"
        assert process.returncode == (-signal.SIGKILL if end == "killed" else 0)
        deadline = time.monotonic() + 15
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members(process.pid)
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
