"""Which samples make global batch t: a pure function of (seed, t), whatever the ranks, workers and restarts.

The epochs are concatenated and cut into full batches. Each epoch is a keyed permutation, computed position by position
by a Feistel network (Luby & Rackoff, 1988) with cycle walking (Black & Rogaway, CT-RSA 2002): no array of the data's
length is shuffled, stored or restored, so step 10^9 costs what step 0 costs.

Quality: 8 rounds of half a 64-bit mixer; neighbours, epochs and seeds look independent to the tests in test_data_order.py.
It is not cryptography, and not every one of the N! orders can come up. Cost: the domain is the next power of four, so
a position takes 1 to 4 walks on average: for a batch of 4,096 of 10^9 images 2.5 ms (7 ms where the domain is four times too
large) and no memory, measured on one busy core; of 10^4 images the same.

A full permutation reads from all shards at once. That is the default wherever the images lie: moving them to another disk must not
change a run. Where they lie on a network disk and only some fit into the machine's memory, data.shuffle=blocks keeps reads together:
the epoch's images, beginning somewhere by key, are cut into blocks of BLOCK neighbours, the blocks are permuted, and of every WINDOW
of them that come up together the images are permuted. Still a bijection for every N, still computed position by position. Quality:
neighbours of a shard come up within WINDOW * BLOCK = 16,384 positions of each other, a third of that on average, each epoch among
other shards; a batch is a draw from about 2 * WINDOW shards of BLOCK images (a block seldom begins where a shard does), so that
shards whose images are sorted by class are mixed less than `full` mixes them.
Cost: two permutations a position, 5 ms a batch.
"""

from functools import lru_cache

import numpy as np

BLOCK = 1024  # images, about those of a shard
WINDOW = 16  # blocks
SMALL = 1 << 18  # images: up to here an epoch is permuted once, 2 MB, and looked up; batch by batch it cost up to a tenth of the cropping
ROUNDS = 8
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # odd constants of splitmix64


def permute(positions: np.ndarray, length: int, key: int | np.ndarray) -> np.ndarray:
    """Where a keyed bijection on range(length) takes the positions.

    `positions`: any shape, int64 in [0, length); `key`: one integer, or one a position (int64, same shape). Returns int64.
    """
    from mae.nets.keyed import hash_integers  # torch comes with it

    half = max((length - 1).bit_length() + 1, 2) // 2  # 4 ** half >= length
    shift, mask = np.uint64(64 - half), np.uint64((1 << half) - 1)
    flat = np.asarray(positions, np.int64).ravel()
    keys = hash_integers(np.broadcast_to(key, np.shape(positions)).ravel(), np.arange(ROUNDS)[:, None]).astype(np.uint64)  # (ROUNDS, P)
    out = flat.astype(np.uint64)
    walking = np.arange(len(flat))
    while len(walking):  # those that left range(length) go on until they come back, as a bijection makes them
        left, right = out[walking] >> np.uint64(half), out[walking] & mask
        for round_keys in keys[:, walking]:
            mixed = (right + round_keys) * np.uint64(MIX_1)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(MIX_2)
            left, right = right, left ^ (mixed >> shift)
        out[walking] = (left << np.uint64(half)) | right
        walking = walking[out[walking] >= length]
    return out.astype(np.int64).reshape(np.shape(positions))


def permute_blocks(positions: np.ndarray, length: int, keys: np.ndarray, *, block: int = BLOCK, window: int = WINDOW) -> np.ndarray:
    """Where a keyed bijection on range(length) that keeps neighbours near each other takes the positions.

    `positions`: (P,) int64 in [0, length); `keys`: (P,) int64, the epoch's; `block` images stay together, the images of `window`
    blocks are mixed. Returns (P,) int64.
    """
    from mae.nets.keyed import hash_integers

    keys = np.broadcast_to(keys, np.shape(positions))
    size = block * window
    number, place = np.divmod(positions, size)
    mixed, own = np.empty_like(place), hash_integers(keys, number)
    last = number == length // size  # the window that is smaller
    for part, width in ((~last, size), (last, length % size)):
        mixed[part] = permute(place[part], width, own[part])
    slot, offset = np.divmod(number * size + mixed, block)
    whole = length // block  # what is left of a block stays last, but the images in it are others each epoch
    inner = slot < whole
    slot[inner] = permute(slot[inner], whole, hash_integers(keys[inner], -1))
    return (slot * block + offset + hash_integers(keys, -2).astype(np.uint64) % np.uint64(length)).astype(np.int64) % length


def global_batch(step: int, *, batch_size: int, length: int, seed: int, shuffle: str = "full") -> tuple[np.ndarray, np.ndarray]:
    """(epochs, ids), both (batch_size,) int64: the samples of global batch `step` of a train set of `length` images.

    They are positions [step * batch_size, (step + 1) * batch_size) of the concatenated epochs: every batch is full, and
    one at the end of an epoch runs into the next. `shuffle`: full | blocks.
    """
    from mae.nets.keyed import STREAMS, hash_integers

    epochs, positions = np.divmod(step * batch_size + np.arange(batch_size), length)
    keys = hash_integers(seed, STREAMS["order"], epochs)
    if length > SMALL:
        return epochs, (permute_blocks if shuffle == "blocks" else permute)(positions, length, keys)
    ids = np.empty_like(positions)
    for key in np.unique(keys).tolist():
        ids[keys == key] = _epoch(length, key, shuffle)[positions[keys == key]]
    return epochs, ids


@lru_cache(maxsize=4)
def _epoch(length: int, key: int, shuffle: str) -> np.ndarray:
    """The whole order of an epoch of few images."""
    return (permute_blocks if shuffle == "blocks" else permute)(np.arange(length), length, np.full(length, key))


def rank_share(
    step: int, *, batch_size: int, length: int, seed: int, rank: int, world: int, shuffle: str = "full"
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, keys), both (batch_size / world,) int64: a rank's contiguous part of global batch `step` and its samples' keys."""
    from mae.nets.keyed import hash_integers

    epochs, ids = global_batch(step, batch_size=batch_size, length=length, seed=seed, shuffle=shuffle)
    part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    return ids[part], hash_integers(seed, epochs[part], ids[part])
