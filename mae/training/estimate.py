"""What a run needs on paper: bytes a rank, bytes between ranks, seconds a step. Plain arithmetic: nothing is run, opened or made.

Sources: ZeRO, arXiv:1910.02054, sections 3 and 7 (16 bytes of state a parameter; the traffic of sharding everything is 1.5 times that of
data parallelism); FSDP, arXiv:2304.11277, section 3; activations as in arithmetic.py. docs/scaling.md says what is assumed and what was
checked against measurement.
"""

import math
from dataclasses import dataclass

from mae.training.arithmetic import Shape

FLOAT32 = 4  # bytes; weights, gradients and moments are kept in it whatever the precision of the forward pass
BUCKET = 25 * 2**20  # bytes that DistributedDataParallel reduces at a time: its default
ADAMW = 28  # bytes of memory that an update reads and writes a parameter: weight, gradient, two moments; all but the gradient written back
# Assumed, not measured yet:
UTILISATION = 0.4  # of the stated rate of matrix products that a training step reaches while its kernels are large
LINK = 0.8  # of the stated rate of a link that a collective reaches
LATENCY = 5e-6  # seconds a hop of a collective; it makes 2 log2(ranks) of them, as a tree does
LAUNCHES, LAUNCH = 12, 5e-6  # kernels of a block's forward pass (twice as many backward), seconds to launch one: a step cannot be faster
ROOM = 0.9  # of a device's memory that may be planned with: the rest is for contexts, workspaces, buffers of collectives, fragments


@dataclass(frozen=True)
class Device:
    """A GPU and how it is connected, as its maker states it."""

    name: str
    memory: float  # bytes
    rate: float  # dense bf16 FLOPs a second
    bandwidth: float  # bytes a second of its memory
    link: float  # bytes a second that one GPU sends to its neighbours within the node
    network: float  # bytes a second that a node sends to the others
    per_node: int = 8


# Makers' data sheets; 400 (H100, H200) or 200 Gbit/s (A100) of InfiniBand a GPU, as in the reference systems of 8.
DEVICES = {
    "a100": Device("A100 80 GB", 80e9, 312e12, 2.04e12, 300e9, 8 * 25e9),
    "h100": Device("H100 80 GB", 80e9, 989e12, 3.35e12, 450e9, 8 * 50e9),
    "h200": Device("H200 141 GB", 141e9, 989e12, 4.8e12, 450e9, 8 * 50e9),
}


@dataclass(frozen=True)
class Layout:
    """How a global batch is worked through: by so many ranks, in so many micro-batches, with whole or sharded state."""

    ranks: int
    images: int  # a rank and micro-batch
    accumulate: int = 1
    sharded: bool = False
    recompute: bool | str = False
    half: bool = True


def state_bytes(parameters: int, *, trained: int | None = None, moments: int = 2, average: bool = False, shards: int = 1) -> float:
    """Bytes of weights, gradients, optimizer moments and, where kept, the average of the weights, on one rank.

    `trained` of the parameters have a gradient (default: all); `moments` is 2 for AdamW, 1 for momentum; spread over `shards` ranks (FSDP).
    With AdamW that is 16 bytes a parameter, as in ZeRO's figure 1 with the float32 weights as the only copy.
    """
    trained = parameters if trained is None else trained
    return FLOAT32 * (parameters + (1 + moments + average) * trained) / shards


def memory(shape: Shape, layout: Layout, *, moments: int = 2, average: bool = False) -> float:
    """Bytes at the peak of a step on one rank: state, half-precision copies of the matrices, activations, the images, what FSDP gathers.

    DistributedDataParallel's buckets are the gradients themselves (gradient_as_bucket_view). Under autocast the copies are whole on every
    rank, since the backward pass reads them; recomputation keeps those of one block.
    """
    shards = layout.ranks if layout.sharded else 1
    state = state_bytes(shape.parameters, trained=shape.trained, moments=moments, average=average, shards=shards)
    block = max(shape.encoder.block, shape.decoder.block)
    copies = 2 * (block if layout.recompute else shape.matrices) if layout.half else 0
    gathered = 3 * FLOAT32 * block if layout.sharded else 0  # a block's weights, those of the next one, a block's gradients
    if layout.sharded and layout.accumulate > 1:
        gathered += FLOAT32 * shape.trained  # gradients stay whole until the last micro-batch
    pixels = shape.patches * shape.values * (1 + FLOAT32)  # as bytes and normalised
    return state + copies + gathered + layout.images * (shape.activations(half=layout.half, recompute=layout.recompute) + pixels)


def traffic(shape: Shape, layout: Layout) -> float:
    """Bytes that each rank sends a step, by rings: 2 (n - 1) / n times the gradients to reduce them; to gather or to scatter takes half.

    FSDP gathers the weights for the forward and again for the backward pass of every micro-batch, and scatters the gradients once.
    """
    part = FLOAT32 * (layout.ranks - 1) / layout.ranks
    if layout.sharded:
        return part * (2 * layout.accumulate * shape.parameters + shape.trained)
    return part * 2 * shape.trained


def seconds(shape: Shape, layout: Layout, device: Device) -> float:
    """Seconds of a step: the larger of computing and communicating wherever the two overlap, and what cannot.

    DDP reduces while the backward pass of the last micro-batch runs, but for the last bucket; FSDP gathers a block while another computes.
    """
    rate = UTILISATION * device.rate
    kernels = LAUNCHES * LAUNCH * (shape.encoder.depth + shape.decoder.depth)
    forward = max(layout.images * shape.forward_flops / rate, kernels)
    backward = max(layout.images * (shape.flops - shape.forward_flops) / rate, 2 * kernels)
    if layout.recompute == "selective":  # what is made anew is read from and written once
        again = shape.activations(half=layout.half) - shape.activations(half=layout.half, recompute="selective")
        backward += 2 * layout.images * again / device.bandwidth
    elif layout.recompute:
        backward += forward
    update = ADAMW * shape.trained / device.bandwidth / (layout.ranks if layout.sharded else 1)
    if layout.ranks == 1:
        return layout.accumulate * (forward + backward) + update
    pace = LINK * (device.link if layout.ranks <= device.per_node else min(device.link, device.network))
    hops = 2 * math.log2(layout.ranks) * LATENCY
    half = FLOAT32 * (layout.ranks - 1) / layout.ranks / pace  # seconds to gather or to scatter a parameter
    if layout.sharded:
        blocks = shape.encoder.depth + shape.decoder.depth + 1
        gather = shape.parameters * half + blocks * hops
        scatter = shape.trained * half + blocks * hops
        first = gather / blocks  # nothing runs yet that could hide it
        before = (layout.accumulate - 1) * (max(forward, gather) + max(backward, gather))
        return before + first + max(forward, gather) + max(backward, gather + scatter) + update
    size = FLOAT32 * shape.trained
    buckets = math.ceil(size / BUCKET)
    reduce = 2 * shape.trained * half + buckets * hops
    last = reduce / buckets  # is ready only when the backward pass is over
    return (layout.accumulate - 1) * (forward + backward) + forward + max(backward, reduce - last) + last + update


def layout_for(
    shape: Shape, batch_size: int, ranks: int, room: float, *, sharded: bool = False, recompute: bool | str = False
) -> Layout | None:
    """A global batch in as few micro-batches as stay within `room` bytes of memory; None where one image is too much."""
    local = batch_size // ranks
    for parts in (n for n in range(1, local + 1) if local % n == 0):
        layout = Layout(ranks, local // parts, accumulate=parts, sharded=sharded, recompute=recompute)
        if memory(shape, layout) <= room:
            return layout
    return None
