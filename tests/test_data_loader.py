"""Batches: the same for any ranks, accumulation, workers, cache and restart; of one size whatever is damaged."""

import dataclasses
import logging
import os
import signal
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae import config
from mae.data import cached, crops, processes
from mae.data.decode import DamagedImage
from mae.data.loader import evaluation_batches, normalise, train_batches
from mae.data.order import global_batch
from mae.errors import ConfigError
from mae.nets.keyed import hash_integers

CPU = torch.device("cpu")


class Pictures:
    """Images that tell their id in their first pixel; some are damaged."""

    classes = ("even", "odd")
    fingerprint = "0" * 16

    def __init__(self, length, *, size=(12, 16), damaged=(), sizes_differ=False):
        self.length, self.size, self.damaged, self.sizes_differ = length, size, set(damaged), sizes_differ
        self.labels = np.arange(length) % 2

    def __len__(self):
        return self.length

    def read(self, index):
        if index in self.damaged:
            raise DamagedImage(self.name_of(index), "bad bytes")
        height, width = self.size
        noise = np.random.default_rng(index).integers(0, 256, (height + (index % 3 if self.sizes_differ else 0), width, 3), dtype=np.uint8)
        noise[0, 0] = index % 256
        return noise

    def name_of(self, index):
        return f"picture {index}"


def configured(*words):
    base = ["encoder.patch_size=4", "data.image_size=8", "data.channels=3", "data.mean=[0.5,0.4,0.3]", "data.std=[0.2,0.3,0.4]"]
    return config.load(
        [*base, "data.cache=none", "data.crop_scale=[0.2,1.0]", "data.flip=true", "train.batch_size=12", "train.steps=9", *words]
    )


def batches(source, settings_, *, first=0, count=3, **kwargs):
    return list(islice(train_batches(source, settings_, first_step=first, device=CPU, **kwargs), count))


def joined(steps):
    """Every field of every sample, in order."""
    return [torch.cat([getattr(batch, field) for step in steps for batch in step]) for field in ("images", "keys", "labels", "ids")]


def assert_same(a, b):
    for x, y in zip(joined(a), joined(b), strict=True):
        assert torch.equal(x, y)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(2, 40),
    per_part=st.integers(1, 3),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    first=st.integers(0, 50),
    cache=st.sampled_from(["none", "ram", "device"]),
)
def test_ranks_and_accumulation_cut_the_same_global_batch(length, per_part, world, accumulate, first, cache):
    size = per_part * world * accumulate
    c = configured(f"train.batch_size={size}", f"data.cache={cache}", "data.crop_scale=[1,1]", "data.image_size=[12,16]", "data.flip=false")
    source = Pictures(length)
    ranks = [batches(source, c, first=first, world=world, rank=r, accumulate=accumulate, count=2) for r in range(world)]
    for t in range(2):
        epochs, ids = global_batch(first + t, batch_size=size, length=length, seed=c.train.seed)
        parts = [batch for rank in ranks for batch in rank[t]]
        assert [len(p.images) for p in parts] == [per_part] * (world * accumulate)
        images, keys, labels, seen = joined([parts])
        assert np.array_equal(seen, ids)
        assert np.array_equal(keys, hash_integers(c.train.seed, epochs, ids))
        assert np.array_equal(labels, ids % 2)
        assert np.array_equal(images, np.stack([source.read(i).transpose(2, 0, 1) for i in ids]))


def test_a_restart_goes_on_where_it_was():
    c, source = configured(), Pictures(17)
    assert_same(batches(source, c, count=5)[3:], batches(source, c, first=3, count=2))


def test_workers_make_the_same_batches_in_the_same_order():
    source = Pictures(17, damaged=[3])
    here, there = (batches(source, configured(f"data.workers={n}"), count=6, accumulate=2) for n in (0, 2))
    assert_same(here, there)
    assert [b.replaced for step in here for b in step] == [b.replaced for step in there for b in step]


@pytest.mark.parametrize("cache", ["ram", "device"])
@pytest.mark.parametrize("shape", ["8", "[8,12]"])
def test_cached_images_give_the_same_crops_to_a_level_of_grey(cache, shape):
    source = Pictures(20, damaged=[3, 4])
    words = [f"data.image_size={shape}"]
    one, other = (joined(batches(source, configured(f"data.cache={name}", *words))) for name in ("none", cache))
    assert all(torch.equal(x, y) for x, y in zip(one[1:], other[1:], strict=True))
    data = configured().data  # crops out of a cache are normalised already: what is a whole level of grey has to be one again
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (data.mean, data.std))
    levels = 255 * (other[0] * std + mean)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    error = (one[0].float() - levels).abs()
    assert error.mean() < 1.0  # noise is the hardest picture: rounding between the passes, and clipping, show most
    assert error.median() <= 1


def test_images_of_several_sizes_are_cached_at_one():
    source = Pictures(20, size=(20, 30), sizes_differ=True)
    c = configured("data.cache=ram", "data.crop_scale=[1,1]", "data.flip=false", "data.resize=1.0")
    images, _, _, ids = joined(batches(source, c))
    expected = np.stack([crops.central(source.read(i), (8, 8), 1.0).transpose(2, 0, 1) for i in ids.tolist()])
    assert np.array_equal(images, expected)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_damaged_image_is_replaced_named_once_and_counted(cache, caplog):
    c = configured("data.crop_scale=[1,1]", "data.image_size=[12,16]", "data.flip=false", f"data.cache={cache}")
    sound, damaged = Pictures(20), Pictures(20, damaged=[5, 11])
    with caplog.at_level(logging.WARNING, "mae"):
        steps = batches(damaged, c, count=5)  # three epochs
    images, keys, labels, ids = joined(steps)
    _, expected_keys, _, expected_ids = joined(batches(sound, c, count=5))
    assert torch.equal(keys, expected_keys)
    assert torch.equal(ids, expected_ids)
    shown = images[:, 0, 0, 0]
    bad = torch.isin(ids, torch.tensor([5, 11]))
    assert torch.equal(shown[~bad], ids[~bad].to(torch.uint8))
    assert not torch.isin(shown, torch.tensor([5, 11])).any()
    assert len(shown[bad].unique()) > 1  # not always the same one
    assert torch.equal(labels, shown.long() % 2)
    assert sum(batch.replaced for step in steps for batch in step) == bad.sum() == 6
    assert sorted(record.message.split(" cannot")[0] for record in caplog.records) == ["picture 11", "picture 5"]
    assert_same(steps, batches(damaged, c, count=5))


@pytest.mark.parametrize("words", [["data.cache=none"], ["data.cache=ram"], ["data.workers=1"]])
def test_too_much_damage_ends_in_one_sentence(words):
    with pytest.raises(ConfigError, match=r"picture \d+ cannot be read: bad bytes.*repair"):
        batches(Pictures(20, damaged=range(20)), configured(*words))


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="not a multiple"):
        batches(Pictures(9), configured(), world=5)


def test_a_transform_gets_the_whole_image_and_the_key():
    c = configured("data.cache=ram")
    source = Pictures(9, size=(20, 30))
    made = batches(source, c, transform=lambda image, key: torch.tensor([[[float(image[0, 0, 0]), float(key % 1000), *image.shape]]]))
    images, keys, _, ids = joined(made)
    assert images.dtype == torch.float32
    expected = torch.stack([ids.float(), (keys % 1000).float(), *(torch.full_like(ids, n).float() for n in (20, 30, 3))], dim=1)
    assert torch.equal(images[:, 0, 0], expected)
    assert normalise(images, c.data) is images


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 30), batch_size=st.integers(1, 8), world=st.integers(1, 3))
def test_evaluation_sees_every_image_once_in_order(length, batch_size, world):
    c = configured("data.image_size=[12,16]")
    source = Pictures(length)
    ranks = [list(evaluation_batches(source, c, batch_size=batch_size, device=CPU, rank=r, world=world)) for r in range(world)]
    in_order = [ranks[i % world][i // world] for i in range(-(-length // batch_size))]
    assert sum(len(rank) for rank in ranks) == len(in_order)
    images, keys, labels, ids = joined([in_order])
    assert ids.tolist() == list(range(length))
    assert labels.tolist() == [i % 2 for i in range(length)]
    assert len(keys.unique()) == length
    assert np.array_equal(images, np.stack([source.read(i).transpose(2, 0, 1) for i in range(length)]))  # exact pixels


def test_evaluation_in_workers_replaces_what_is_damaged():
    source = Pictures(11, damaged=[4])
    here, there = (list(evaluation_batches(source, configured(f"data.workers={n}"), batch_size=4, device=CPU)) for n in (0, 2))
    assert_same([here], [there])
    assert [b.replaced for b in there] == [0, 1, 0]


def test_unlabelled_images_have_the_label_minus_one():
    source = Pictures(9)
    source.labels = source.classes = None
    for words in ([], ["data.cache=ram"]):
        assert (joined(batches(source, configured(*words)))[2] == -1).all()


def test_normalisation_is_the_formula():
    c = configured()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (c.data.mean, c.data.std))
    torch.testing.assert_close(normalise(images, c.data), (images / 255 - mean) / std)
    other = dataclasses.replace(c.data, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    torch.testing.assert_close(normalise(images, other), images / 255)


def test_a_cache_larger_than_the_machine_is_refused():
    class Endless(Pictures):
        def __len__(self):
            return 1 << 50

    with pytest.raises(ConfigError, match=r"data\.cache=none"):
        batches(Endless(4), configured("data.cache=ram"))


def test_every_rank_of_a_machine_has_a_cache_of_its_own(monkeypatch):
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    half = (memory // 2 // (12 * 3 * 16), 12, 3, 16)
    monkeypatch.setattr(cached.np, "zeros", lambda shape, kind: shape)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cached._allocate(half, np.dtype(np.uint8)) == half
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"8 ranks with .* images each"):
        cached._allocate(half, np.dtype(np.uint8))


def test_nothing_draws_from_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches(Pictures(9), configured())
    assert torch.equal(torch.get_rng_state(), before)


def _die(image, key):
    os.kill(os.getpid(), signal.SIGKILL)


def _stall(image, key):
    time.sleep(60)


@pytest.mark.parametrize(
    ("transform", "stalled", "message"),
    [(_die, 60, "reads images died"), pytest.param(_stall, 1, "does not answer", marks=pytest.mark.slow)],
)
def test_a_dead_or_stuck_worker_is_told_and_not_waited_for(transform, stalled, message, monkeypatch):
    assert processes.PATIENCE_SECONDS <= 20  # named within 30 seconds
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", 2)
    monkeypatch.setattr(processes, "STALLED_SECONDS", stalled)
    with pytest.raises(RuntimeError, match=message):
        batches(Pictures(9), configured("data.workers=1"), transform=transform)
