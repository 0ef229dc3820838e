"""One thread a process: the tests run in two processes, and those start others; many small threads on few cores wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
