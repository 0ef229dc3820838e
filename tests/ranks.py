"""Real processes with gloo, forked from one server that has imported what they need."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work, folder, world, *arguments):
    """What `work(rank, world, *arguments)` returns on each of `world` ranks of one process group; results are tensors in dicts."""
    mp.set_forkserver_preload(["mae.api", "mae.training.parallel", "mae.training.loop", "mae.training.saving", work.__module__])
    folder.mkdir(exist_ok=True)
    mp.start_processes(_rank, args=(world, work, str(folder), arguments), nprocs=world, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


def _rank(rank, world, work, folder, arguments):
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
