"""What is freed stays with a command's process until it is handed back."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
import threading
import torch
from mae import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    some = [torch.ones(10 << 20) for _ in range(4)]  # as a step's activations: 40 MiB each, all freed at its end
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(faults()))
    thread.start()
    thread.join()
    return found[0]

def resident():
    return int(open("/proc/self/statm").read().split()[1])

memory.keep_freed()
taken = [faults() for _ in range(8)]
elsewhere = in_a_thread()
held = resident()
memory.give_back()
print(taken[-1], held - resident(), elsewhere)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}], ids=["by default", "chosen otherwise"])
def test_freed_memory_is_kept_for_what_comes_next_and_handed_back_when_asked(chosen):
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "", **chosen}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    again, returned, elsewhere = map(int, done.stdout.split())
    few = 40  # half of what it takes in huge pages
    if chosen:
        assert again > few
    else:
        assert again < few
        assert elsewhere < few  # what one thread has freed, another one takes
        assert returned > (80 << 20) // resource.getpagesize()
