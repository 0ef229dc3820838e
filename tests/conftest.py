"""What every process of the tests, and those that they start, begin with."""

import os
import signal

# one thread a process: the tests run in two processes, and those start others; many small threads on few cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background; programs under test hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
