"""Plain JPEGs that go their own way, to the device or crop by crop, become what reading them one by one would have made of them."""

import io

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae import config
from mae.data import jpeg, loader, packed, plain, region
from mae.data.decode import DamagedImage, decode
from mae.data.folder import Folder
from mae.data.loader import TrainSteps
from mae.data.packed import Packed
from mae.data.sources import Subset, open_splits

pytest.importorskip("simplejpeg")
with_regions = pytest.mark.skipif(not region.available(), reason="needs nvImageCodec")


@pytest.fixture
def photos(tmp_path):
    """Forty images of many sizes: JPEGs in colour and grey, a turned one, PNGs, three cut off, three that are no images."""
    generator = np.random.default_rng(0)
    for number in range(40):
        waves = np.sin(np.arange(40 + number)[:, None, None] / generator.uniform(2, 9, 3) + np.arange(60)[None, :, None] / 7)
        image, stream, how = Image.fromarray((127 + 120 * waves).astype(np.uint8)), io.BytesIO(), {}
        if number % 5 == 1:
            image = image.convert("L")
        if number == 7:
            how = {"exif": Image.Exif()}
            how["exif"][0x0112] = 6
        image.save(stream, "PNG" if number % 7 == 3 else "JPEG", **how)
        content = stream.getvalue()
        content = content[: len(content) // 2] if number in (12, 13, 14) else b"nothing" if number in (20, 21, 22) else content
        (tmp_path / f"{number:02}.jpg").write_bytes(content)
    words = [f"data.path={tmp_path}", "data.image_size=32", "data.workers=0", "data.damage=1", "train.batch_size=16"]
    cfg = config.load(["configs/data/folder.yaml", *words, "data.decode=gpu"])
    return cfg, open_splits(cfg.data).train


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_unpacked_later_equals_what_is_read_at_once(photos, channels):
    cfg, source = photos
    cfg = config.load([f"data.channels={channels}", f"data.mean={[0.5] * channels}", f"data.std={[0.5] * channels}"], base=cfg.as_dict())
    source = open_splits(cfg.data).train
    ids = np.arange(len(source))
    keys = ids * 1_000_003 + 5
    steps = TrainSteps(source, cfg, 0, 1, None)
    found = steps.packing.pack(ids, keys)
    assert isinstance(found, Packed)
    assert len(found.table) > (2 if channels == 1 else len(ids) // 2)  # the grey ones; most of them
    later, at_once = steps.packing.unpack(found, torch.device("cpu")), steps.read(ids, keys)
    assert torch.equal(later.images, at_once.images)
    assert torch.equal(later.numbers, at_once.numbers)
    assert np.array_equal(later.replaced, at_once.replaced)
    assert {str(d) for d in later.damage} == {str(d) for d in at_once.damage}
    assert later.replaced.sum() >= 2


@with_regions
def test_unpacking_only_the_crops_changes_nothing(photos):
    cfg, source = photos
    steps = TrainSteps(source, config.load(["data.decode=cpu"], base=cfg.as_dict()), 0, 1, None)
    ids = np.arange(len(source))
    for keys in (ids * 1_000_003 + 5, ids + 77):
        found, expected = steps.regions.read(ids, keys), steps.read(ids, keys)
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.numbers, expected.numbers)
        assert np.array_equal(found.replaced, expected.replaced)
        assert {str(d) for d in found.damage} == {str(d) for d in expected.damage}
    assert found.replaced.sum() >= 2


@with_regions
def test_a_reading_process_holds_few_files_and_is_busy_until_all_are_unpacked(photos, monkeypatch):
    cfg, source = photos
    steps = TrainSteps(source, config.load(["data.decode=cpu"], base=cfg.as_dict()), 0, 1, None)
    held, busy, decode_regions, all_plain = [], [], region.decode, plain.plain_jpegs
    monkeypatch.setattr(plain, "PIXELS", 1 << 14)
    pixels = []

    def decode(files, boxes):
        busy.append(steps.reading.longest())
        pixels.append(boxes[:, 2:].prod(1))
        return decode_regions(files, boxes)

    monkeypatch.setattr(region, "decode", decode)
    monkeypatch.setattr(plain, "plain_jpegs", lambda *a: held.append(len(a[3])) or all_plain(*a))
    steps.regions.read(np.arange(200) % len(source), np.arange(200))
    assert sum(held) == 200
    assert max(held) <= 32
    assert len(busy) >= 10
    assert all(crops.sum() < (1 << 14) + crops.max() for crops in pixels)
    assert max(map(len, pixels)) > 1
    assert None not in busy
    assert steps.reading.longest() is None
    assert steps.packing is None
    packing = TrainSteps(source, cfg, 0, 1, None).packing
    packing.pack(np.arange(9), np.arange(9))
    assert packing.reading.longest() is None


@pytest.mark.parametrize("why", ["progressive", "not loaded", "failing"])
@with_regions
def test_files_that_give_no_crops_are_read_once(why, tmp_path, monkeypatch):
    for number in range(8):
        Image.new("RGB", (40, 50), (number, 0, 0)).save(tmp_path / f"{number}.jpg", progressive=why == "progressive")
    cfg = config.load(["configs/data/folder.yaml", f"data.path={tmp_path}", "data.image_size=32", "data.workers=0"])
    source = open_splits(cfg.data).train
    steps = TrainSteps(source, cfg, 0, 1, None)
    if why != "progressive":
        loaded = None if why == "not loaded" else (object(), None, [])
        monkeypatch.setattr(region, "_decoder", lambda: loaded)
    ids, reads, content = np.arange(32) % len(source), [], Folder.content
    monkeypatch.setattr(Folder, "content", lambda self, index: reads.append(index) or content(self, index))
    for _ in range(4):
        assert torch.equal(steps.regions.read(ids, ids).images, steps.read(ids, ids).images)
    assert len(reads) == 8 * 32 + (0 if why == "not loaded" else 2 * 32)


def test_files_that_were_cut_are_not_left_to_a_device(photos):
    cfg, source = photos
    ids = np.arange(len(source))
    found = TrainSteps(source, cfg, 0, 1, None).packing.pack(ids, ids)
    sent = {source.name_of(place) for place in found.table[:, 1].tolist()}
    assert len(sent) > 15
    assert not sent & {"12.jpg", "13.jpg", "14.jpg"}


def test_a_device_unpacks_few_images_at_once_and_its_want_of_memory_is_no_damage(photos, monkeypatch):
    cfg, source = photos
    steps, count, ids = TrainSteps(source, cfg, 0, 1, None), [], np.arange(160) % len(source)
    unpacked = packed._unpacked
    monkeypatch.setattr(packed, "_unpacked", lambda files, *a: count.append(len(files)) or unpacked(files, *a))
    found = steps.packing.pack(ids, ids)
    assert torch.equal(steps.packing.unpack(found, torch.device("cpu")).images, steps.read(ids, ids).images)
    assert max(count) <= 32

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("torchvision.io.decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        steps.packing.unpack(found, torch.device("cpu"))


@with_regions
@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    channels=st.sampled_from([1, 3]),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
    how=st.fixed_dictionaries(
        {
            "quality": st.integers(1, 100),
            "subsampling": st.integers(0, 2),
            "progressive": st.booleans(),
            "restart_marker_blocks": st.integers(0, 9),
        }
    ),
    damage=st.none() | st.tuples(st.floats(0, 0.9999), st.integers(1, 255)),
)
def test_a_crop_of_any_plain_jpeg_is_that_of_the_whole_image_or_none(height, width, channels, shares, how, damage):
    stream, pixels = io.BytesIO(), np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(stream, "JPEG", **how)
    content = bytearray(stream.getvalue())
    if damage is not None:
        content[int(damage[0] * len(content))] ^= damage[1]
    content = bytes(content)
    sides = jpeg.plain(content, channels=3, most=10**6)
    if sides is None:
        return
    tall, wide = 1 + int(shares[0] * (sides[0] - 1)), 1 + int(shares[1] * (sides[1] - 1))
    top, left = round(shares[2] * (sides[0] - tall)), round(shares[3] * (sides[1] - wide))
    box = np.array([top, left, tall, wide])
    cut = region.decode([content], box[None])[0] if region.suits(content, box) else None
    try:
        expected = decode(content, channels=3, name="x")[top : top + tall, left : left + wide]
    except DamagedImage:
        assert cut is None
    else:
        assert np.array_equal(cut, expected) or (cut is None and (damage is not None or how["progressive"] or wide == 1))


def test_steps_of_one_kind_alone(photos):
    cfg, source = photos
    whole = TrainSteps(source, cfg, 0, 1, None)
    for jpegs in (True, False):
        kept = np.array([i for i in range(len(source)) if (int(source.name_of(i)[:2]) % 7 != 3) == jpegs])
        steps = TrainSteps(Subset(source, kept), cfg, 0, 1, None)
        ids = np.arange(len(kept))
        found = steps.packing.unpack(steps.packing.pack(ids, ids + 1), torch.device("cpu"))
        assert torch.equal(found.images, steps.read(ids, ids + 1).images)
    assert whole.packing is not None


@pytest.mark.parametrize("broken", [False, True])
def test_a_device_that_unpacks_nothing_is_told_once_and_costs_no_image(broken, photos, monkeypatch, caplog):
    def without_nvjpeg(files, **_):
        raise RuntimeError("not compiled with nvJPEG support\nsecond line")

    cfg, source = photos
    if broken:
        monkeypatch.setattr(torchvision.io, "decode_jpeg", without_nvjpeg)
    steps, ids = TrainSteps(source, cfg, 0, 1, None), np.arange(len(source))
    for keys in (ids + 1, ids + 50, ids + 99, ids + 150):
        found = steps.packing.unpack(steps.packing.pack(ids, keys), torch.device("cpu"))
        assert torch.equal(found.images, steps.read(ids, keys).images)
    told = [r.getMessage() for r in caplog.records if "data.decode=gpu" in r.getMessage()]
    assert len(told) == broken
    assert all("(not compiled with nvJPEG support): choose data.decode=cpu" in line for line in told)


@pytest.mark.gpu
def test_a_gpu_unpacks_what_the_cpu_does_and_copies_ahead(photos):
    cfg, source = photos
    plain = config.load(["data.decode=cpu"], base=cfg.as_dict())
    there, here = torch.device("cuda"), torch.device("cpu")
    ways = [loader.train_batches(source, c, first_step=0, device=d) for c, d in ((cfg, there), (plain, there), (plain, here))]
    for _, (unpacked,), (copied,), (expected,) in zip(range(5), *ways, strict=False):
        assert torch.equal(copied.images.cpu(), expected.images)
        assert torch.equal(unpacked.keys.cpu(), expected.keys)
        assert (unpacked.images.cpu().float() - expected.images.float()).abs().mean() < 2
