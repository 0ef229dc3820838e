"""On a CPU: the halves of a batch side by side, each on half of the cores, instead of every operation on all of them.

Cores that share an operation wait for each other at its end; with images of their own they meet once a step. Each half is a forward and
a backward pass in a thread of its own. A weight's gradient is the sum of two, and of two numbers the sum is the same in either order, so
that a step does not depend on which thread is faster.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mae.data.batch import Batch
from mae.keys import Train
from mae.training.distributed import Ranks

Work = Callable[[Batch, int], dict[str, Tensor]]  # (images, how many such parts a step has) -> the part's share of the step's figures


def possible(module: nn.Module, train: Train, ranks: Ranks) -> bool:
    """Whether the steps of a run may be taken so: on the cores of a CPU, with batches of halves, and with nothing that both would touch.

    Micro-batches would make a gradient the sum of more than two, compiled code and the loss scaler are not made for two threads, and
    buffers and the generator of dropout would depend on who comes first.
    """
    threads, state = torch.get_num_threads(), module.state_dict().keys()
    return (
        ranks.device.type == "cpu"
        and ranks.world == 1
        and threads > 1
        and threads % 2 == 0
        and train.batch_size % 2 == 0
        and train.accumulate in ("auto", 1)
        and not (train.compile or train.precision == "fp16")
        and getattr(module, "separable", False)
        and not any(name in state for name, _ in module.named_buffers())
        and not any(_random(child) for child in module.modules())
    )


def _random(module: nn.Module) -> bool:
    """Whether it draws from the global generator in training: dropout or, with `drop_prob`, timm's drop path."""
    return (isinstance(module, _DropoutNd) and module.p > 0) or bool(getattr(module, "drop_prob", 0))


@contextlib.contextmanager
def side_by_side(work: Work, module: nn.Module, train: Train, ranks: Ranks) -> Iterator[Work]:
    """Yields what does the same as `work` on a batch; where that is `possible`, half of it in each of two threads, which end here."""
    if not possible(module, train, ranks):
        yield work
        return
    threads, both_there = torch.get_num_threads(), threading.Barrier(2, timeout=60)

    def prepare() -> None:
        torch.get_num_threads()  # takes over the process's number, which would otherwise replace this thread's own later
        torch.set_num_threads(threads // 2)
        torch.set_flush_denormal(True)  # a thread's own setting; this one's is that of every run

    with ThreadPoolExecutor(2, "half", prepare) as pool:
        wait([pool.submit(both_there.wait) for _ in range(2)])
        torch.set_num_threads(threads)  # for threads to come: the two have just told torch otherwise

        def halves(batch: Batch, parts: int) -> dict[str, Tensor]:
            """`work` on each half, in threads of their own."""
            cuts = batch.images.chunk(2), batch.keys.chunk(2), batch.labels.chunk(2), batch.ids.chunk(2)
            parted = [Batch(*tensors, replaced=0, seed=int(tensors[1].sum())) for tensors in zip(*cuts, strict=True)]
            tasks = [pool.submit(work, part, 2 * parts) for part in parted]
            wait(tasks)  # for both, before an error of one is raised
            first, second = (task.result() for task in tasks)
            return {name: first[name] + second[name] for name in first}

        yield halves
