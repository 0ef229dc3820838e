"""One call of the operating system that fails, or is the last one: the same action again and again, with the next call hit each time.

strace stands between a process and the kernel and injects the signal or the error; the action runs in a fork of this process. Used by
benchmarks/chaos.py and tests/test_checkpoint.py.
"""

import collections
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# What commits bytes and names to a disk, under the names that it has on different machines and C libraries.
CALLS = ("write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2")
ATTACH_SECONDS = 20


def unavailable() -> str | None:
    """Why calls cannot be hit on this machine, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    code, calls = traced(lambda: None)
    return None if code == 0 else f"strace cannot attach to a process here (exit code {code}, {sum(calls.values())} calls seen)"


def points(action: Callable[[], object]) -> list[tuple[str, int]]:
    """Every call of CALLS that the action makes in one thread: (call, how many of its kind it is)."""
    code, calls = traced(action)
    if code != 0:
        raise RuntimeError(f"the action ends with {code} when nothing fails")
    return [(call, number) for call in CALLS for number in range(1, calls[call] + 1)]


def traced(action: Callable[[], object], injected: str | None = None) -> tuple[int, collections.Counter[str]]:
    """Does the action in a fork under strace; returns its exit code (negative: the signal that killed it) and what CALLS it made.

    `injected` is strace's, such as `fsync:signal=KILL:when=2` or `write:error=ENOSPC:when=1+`. An exception in the action is exit code 1.
    """
    with tempfile.TemporaryDirectory() as place:
        log, (read, write) = Path(place) / "log", os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            _act(action, read)
        os.close(read)
        command = ["strace", "-f", "-o", str(log), "-e", f"trace={','.join('?' + call for call in CALLS)}", "-p", str(child)]
        tracer = subprocess.Popen([*command, *(["-e", f"inject={injected}"] if injected else [])], stderr=subprocess.DEVNULL)
        try:
            _wait_until_traced(child, tracer)
        finally:
            os.close(write)  # go
        _, status = os.waitpid(child, 0)
        tracer.wait()
        lines = log.read_text().splitlines() if log.exists() else []
    threads = collections.Counter(tuple(found.groups()) for line in lines if (found := re.match(r"(\d+)\s+(\w+)\(", line)))
    calls: collections.Counter[str] = collections.Counter()
    for (_, call), count in threads.items():  # strace counts in every thread for itself
        calls[call] = max(calls[call], count)
    return os.waitstatus_to_exitcode(status), calls


def _act(action: Callable[[], object], go: int) -> None:
    code = 1
    with contextlib.suppress(BaseException):
        os.read(go, 1)
        action()
        code = 0
    os._exit(code)


def _wait_until_traced(child: int, tracer: subprocess.Popen) -> None:
    deadline = time.monotonic() + ATTACH_SECONDS
    while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            tracer.kill()
            os.kill(child, 9)
            return
        time.sleep(0.002)
