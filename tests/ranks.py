"""Real processes with gloo, forked from one server that has imported what they need."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["mae.api", "mae.training.parallel", "mae.training.loop", "mae.training.saving"]


def on_ranks(work, folder, world, *arguments):
    """What `work(rank, world, *arguments)` returns on each of `world` ranks of one process group; results are tensors, also in dicts."""
    mp.set_forkserver_preload([*IMPORTED, work.__module__])
    folder.mkdir(exist_ok=True)
    # A folder of its own: a group that finds the store of an earlier one looks for that one's addresses.
    place = tempfile.mkdtemp(dir=folder, prefix="ranks-")
    mp.start_processes(_rank, args=(world, work, place, arguments), nprocs=world, start_method="forkserver")
    return [torch.load(f"{place}/{rank}.pt") for rank in range(world)]


def _rank(rank, world, work, place, arguments):
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=world)
    torch.save(work(rank, world, *arguments), f"{place}/{rank}.pt")
    dist.destroy_process_group()


def trained(method, images, keys, rank, world, steps, rate):
    """Plain gradient descent on this rank's part of a batch (every world-th sample); returns (losses, metrics of the last step)."""
    module = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False) if world > 1 else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        output = module(images[rank::world], keys=keys[rank::world])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.detach())
    return torch.stack(losses), output.metrics
