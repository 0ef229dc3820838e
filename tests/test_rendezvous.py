"""Ranks that torchrun starts again meet each other, not the addresses of the dead in the store that outlived them."""

import multiprocessing
import os
import time

import torch
import torch.distributed as dist

from mae.training import distributed


def _rank(rank, port, delay, results):
    torch.set_num_threads(1)
    time.sleep(delay)
    launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in launched.items()}, TORCHELASTIC_RUN_ID="r", TORCHELASTIC_USE_AGENT_STORE="True")
    with distributed.start("cpu", 0.5) as ranks:
        results.put(int(distributed.total(torch.tensor(rank + 1), ranks)))
        results.close()
        results.join_thread()
        os._exit(9)  # without leaving the group, as a rank that is killed


def test_a_rank_that_is_early_waits_for_the_new_ranks_not_for_the_dead_ones():
    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for delays in ((0, 0), (1.0, 0), (0, 1.0)):  # the same store for every attempt
        results = context.Queue()
        ranks = [context.Process(target=_rank, args=(rank, store.port, delay, results)) for rank, delay in enumerate(delays)]
        for process in ranks:
            process.start()
        try:
            assert [results.get(timeout=20), results.get(timeout=20)] == [3, 3]
        finally:
            for process in ranks:
                process.join(20)
                process.kill()
