"""Random crops: torchvision's distribution, Pillow's pixels, the same for a sample wherever it is made."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from mae.data import crops
from mae.data.resample import crop_batch, crop_one
from mae.nets.keyed import hash_integers

KEYS = hash_integers(0, 0, np.arange(4000))


def picture(height, width, channels=3, seed=0):
    """Smooth shapes with some noise, as photos have."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels), dtype=np.uint8)
    layers = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    noise = rng.normal(0, 8, (height, width, channels))
    return np.clip(np.stack([np.asarray(layer) for layer in layers], axis=-1) + noise, 0, 255).astype(np.uint8)


def by_pillow(image, box, size):
    top, left, height, width = (int(v) for v in box)
    layers = [Image.fromarray(image[top : top + height, left : left + width, c]) for c in range(image.shape[2])]
    return np.stack([np.asarray(layer.resize(size[::-1], Image.Resampling.BICUBIC)) for layer in layers])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=6),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    aspect=st.sampled_from([1.0, 0.5, 2.5]),
    seed=st.integers(0, 99),
)
def test_boxes_lie_inside_and_do_not_depend_on_the_batch(sizes, scale, aspect, seed):
    heights, widths = np.array(sizes).T
    keys = hash_integers(seed, 0, np.arange(len(sizes)))
    boxes = crops.boxes(keys, heights, widths, scale=scale, aspect=aspect)
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height > 0).all()
    assert (width > 0).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()
    alone = [crops.boxes(keys[i : i + 1], heights[i : i + 1], widths[i : i + 1], scale=scale, aspect=aspect)[0] for i in range(len(sizes))]
    assert np.array_equal(boxes, alone)


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (375, 500, (0.08, 1.0)), (100, 900, (0.2, 1.0))])
def test_boxes_are_distributed_as_torchvisions(height, width, scale):
    ours = crops.boxes(KEYS, np.full(4000, height), np.full(4000, width), scale=scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    for a, b in zip(ours.T, theirs.T, strict=True):  # two-sample Kolmogorov-Smirnov, at one in ten thousand
        values = np.unique(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(np.sort(a), values, "right") - np.searchsorted(np.sort(b), values, "right")).max() / 4000
        assert distance < 2.2 * (2 / 4000) ** 0.5


def test_no_crop_is_the_largest_centred_box_for_every_key():
    boxes = crops.boxes(KEYS[:3], np.array([10, 20, 9]), np.array([20, 10, 9]), scale=(1, 1))
    assert boxes.tolist() == [[0, 5, 10, 10], [5, 0, 10, 10], [0, 0, 9, 9]]
    assert crops.boxes(KEYS[:1], np.array([100]), np.array([100]), scale=(1, 1), aspect=2.0).tolist() == [[25, 0, 50, 100]]


def test_half_of_the_samples_are_mirrored():
    assert abs(crops.flips(KEYS).mean() - 0.5) < 0.04


@pytest.mark.parametrize(
    ("source", "channels", "size"),
    [((32, 32), 3, (32, 32)), ((28, 40), 1, (24, 40)), ((70, 90), 1, (24, 40)), ((70, 90), 3, (96, 48))],
)
def test_both_ways_of_cropping_give_pillows_pixels(source, channels, size):
    image = picture(*source, channels)
    boxes = crops.boxes(KEYS[:64], np.full(64, source[0]), np.full(64, source[1]), scale=(0.05, 1.0))
    expected = np.stack([by_pillow(image, box, size) for box in boxes]).astype(int)
    images = torch.from_numpy(image.transpose(2, 0, 1).copy()).expand(64, -1, -1, -1)
    batched = crop_batch(images, boxes, None, size).numpy()
    singly = np.stack([crop_one(image, box, False, size).numpy() for box in boxes])
    for pixels in (batched, singly):
        error = np.abs(pixels - expected)
        assert error.mean() < 0.35
        assert error.mean(axis=(1, 2, 3)).max() < 0.6


def test_crops_of_the_target_size_are_exact_and_flips_mirror():
    image = picture(40, 40)
    boxes = np.array([[3, 5, 32, 32], [3, 5, 32, 32]])
    expected = torch.from_numpy(image[3:35, 5:37].transpose(2, 0, 1).copy())
    images = torch.from_numpy(image.transpose(2, 0, 1).copy()).expand(2, -1, -1, -1)
    plain, mirrored = crop_batch(images, boxes, np.array([False, True]), (32, 32))
    assert torch.equal(plain, expected)
    assert torch.equal(mirrored, expected.flip(2))
    assert torch.equal(crop_one(image, boxes[0], False, (32, 32)), expected)
    assert torch.equal(crop_one(image, boxes[0], True, (32, 32)), expected.flip(2))


def test_a_sample_is_cropped_alike_in_any_batch():
    images = torch.from_numpy(np.stack([picture(32, 32, seed=i).transpose(2, 0, 1) for i in range(9)]))
    boxes = crops.boxes(KEYS[:9], np.full(9, 32), np.full(9, 32), scale=(0.2, 1.0))
    whole = crop_batch(images, boxes, None, (32, 32)).int()
    parts = torch.cat([crop_batch(images[i : i + 1], boxes[i : i + 1], None, (32, 32)) for i in range(9)]).int()
    assert (whole - parts).abs().max() <= 1  # a matrix product may add in another order
    assert (whole != parts).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("shape", "size", "factor"), [((375, 500), 224, 256 / 224), ((300, 200), 64, 1.0), ((32, 32), 32, 1.0), ((20, 31), 32, 1.143)]
)
def test_evaluation_sees_torchvisions_resize_and_centre_crop(shape, size, factor):
    image = picture(*shape)
    expected = CenterCrop(size)(Resize(round(size * factor), InterpolationMode.BICUBIC)(Image.fromarray(image)))
    ours = crops.central(image, (size, size), factor)
    error = np.abs(ours.astype(int) - np.asarray(expected).astype(int))
    assert error.mean() < 0.01
    assert error.max() <= 1
    if shape == (size, size) and factor == 1:
        assert np.array_equal(ours, image)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    factor=st.floats(1, 2),
    channels=st.sampled_from([1, 3]),
)
def test_evaluation_covers_any_shape_from_any_shape(shape, size, factor, channels):
    image = np.full((*shape, channels), 77, np.uint8)
    view = crops.central(image, size, factor)
    assert view.shape == (*size, channels)
    assert (view == 77).all()
