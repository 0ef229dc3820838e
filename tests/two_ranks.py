"""Two real processes with gloo, for what must be the same however a batch is spread."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(work, folder):
    """What `work(rank, 2)` returns on each of two ranks of one process group; `work` is a module's function, its results are tensors.

    The ranks are forked, which spares them the imports.
    """
    mp.start_processes(_rank, args=(work, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def _rank(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, 2), f"{folder}/{rank}.pt")
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
