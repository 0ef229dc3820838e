"""Exactly once: through real shards and the real loader, whatever the ranks, reading processes, batches and restarts."""

import dataclasses
import io
import shutil
import tarfile
from functools import cache, lru_cache
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae import config
from mae.data.loader import train_batches
from mae.data.sources import open_splits
from mae.nets.keyed import hash_integers

CPU = torch.device("cpu")


@lru_cache(maxsize=1)
def configured():
    return config.load(["data.name=shards", "data.path=.", "data.image_size=8", "encoder.patch_size=4", "data.flip=true"])


@cache
def picture(number):
    """A PNG of one colour, which says its number whatever is cropped of it."""
    buffer = io.BytesIO()
    Image.new("RGB", (5 + number % 3, 4), (number % 256, number // 256, 77)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write(file, numbers):
    with tarfile.open(file, "w") as archive:
        for number in numbers:
            member = tarfile.TarInfo(f"{number:04}.png")
            member.size = len(picture(number))
            archive.addfile(member, io.BytesIO(picture(number)))


def seen(c, ranks, first, last, accumulate):
    """(numbers, keys), both (steps x batch,) int64: what the pictures of these steps show, of all ranks in order."""
    train = open_splits(c.data).train
    parts = []
    for rank in range(ranks):
        steps = train_batches(train, c, first_step=first, device=CPU, rank=rank, world=ranks, accumulate=accumulate)
        parts.append(list(islice(steps, last - first)))
        steps.close()
    batches = [batch for step in zip(*parts, strict=True) for rank in step for batch in rank]
    corners = [batch.images[:, :, 0, 0].long() for batch in batches]
    assert all((batch.images == corner[..., None, None]).all() for batch, corner in zip(batches, corners, strict=True))
    numbers = torch.cat([corner[:, 0] + 256 * corner[:, 1] for corner in corners]).numpy()
    return numbers, torch.cat([batch.keys for batch in batches]).numpy()


settings_of_runs = {
    "sizes": st.lists(st.integers(0, 15), min_size=1, max_size=5).filter(sum),
    "ranks": st.integers(1, 4),
    "later": st.integers(1, 4),  # ranks after the restart
    "accumulate": st.integers(1, 3),
    "per_part": st.integers(1, 6),
    "resume": st.integers(0, 8),
    "shuffle": st.sampled_from(["full", "blocks"]),
    "seed": st.integers(0, 2**31),
}


def assert_seen_exactly_once(folder, workers, *, sizes, ranks, later, accumulate, per_part, resume, shuffle, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    length, starts = sum(sizes), np.cumsum([0, *sizes])
    for shard, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        write(folder / f"train-{shard}.tar", range(start, start + size))
    write(folder / "val-0.tar", [length])
    write(folder / "test-0.tar", [length + 1])
    unit = ranks * later * accumulate  # what a batch is a multiple of, before the restart and after it
    batch = unit * max(per_part, length // (4 * unit))  # not too many steps
    c = configured()
    train = dataclasses.replace(c.train, batch_size=batch, seed=seed)
    data = dataclasses.replace(c.data, path=str(folder), shuffle=shuffle)
    before, after = (dataclasses.replace(c, train=train, data=dataclasses.replace(data, workers=number)) for number in workers)
    steps = max(-(-2 * length // batch), resume + 1)
    parts = [seen(before, ranks, 0, resume, accumulate)] if resume else []
    parts += [seen(after, later, resume, steps, accumulate)]  # stopped, and gone on with other ranks and processes
    numbers, keys = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert len(numbers) == steps * batch
    for epoch in range(-(-len(numbers) // length)):
        part = slice(epoch * length, (epoch + 1) * length)
        whole = len(numbers[part]) == length
        assert np.array_equal(np.sort(numbers[part]), np.arange(length)) if whole else len(set(numbers[part])) == len(numbers[part])
        assert np.array_equal(keys[part], hash_integers(seed, epoch, numbers[part]))


@settings(max_examples=200, deadline=None)
@given(**settings_of_runs)
def test_every_image_of_every_shard_is_seen_exactly_once_an_epoch(tmp_path_factory, **drawn):
    assert_seen_exactly_once(tmp_path_factory.getbasetemp() / "shards", (0, 0), **drawn)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(workers=st.tuples(st.integers(0, 3), st.integers(0, 3)), **settings_of_runs)
def test_reading_processes_change_nothing_about_that(tmp_path_factory, workers, **drawn):
    assert_seen_exactly_once(tmp_path_factory.getbasetemp() / "shards", workers, **drawn)
