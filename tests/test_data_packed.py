"""Plain JPEGs that go their own way, to the device or crop by crop, become what reading them one by one would have made of them."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae import config
from mae.data import loader, region
from mae.data.decode import DamagedImage, decode
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
    packed = steps.packing.pack(ids, keys)
    assert isinstance(packed, Packed)
    assert len(packed.table) > (2 if channels == 1 else len(ids) // 2)  # the grey ones; most of them
    later, at_once = steps.packing.unpack(packed, torch.device("cpu")), steps.read(ids, keys)
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
    flipped=st.none() | st.floats(0, 0.999),
)
def test_a_crop_of_any_plain_jpeg_is_that_of_the_whole_image(height, width, channels, shares, how, flipped):
    stream, pixels = io.BytesIO(), np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(stream, "JPEG", **how)
    content = bytearray(stream.getvalue())
    if flipped is not None:  # one byte of the pixels or of the header before them
        start = content.index(b"\xff\xda") + 4
        content[start + int(flipped * (len(content) - 2 - start))] ^= 0x10
    content = bytes(content)
    tall, wide = 1 + int(shares[0] * (height - 1)), 1 + int(shares[1] * (width - 1))
    top, left = round(shares[2] * (height - tall)), round(shares[3] * (width - wide))
    box = np.array([top, left, tall, wide])
    try:
        expected = decode(content, channels=3, name="x")[top : top + tall, left : left + wide]
    except DamagedImage:
        return
    if region.suits(content, box):
        (cut,) = region.decode([content], box[None])
        assert (flipped is not None and cut is None) or np.array_equal(cut, expected)


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
