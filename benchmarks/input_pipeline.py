"""How many images a second does a core prepare for training, beside the textbook's pipeline?

    python benchmarks/input_pipeline.py [--photos DIR] [--shards DIR] [--quick]

The textbook's: Pillow decodes, torchvision's RandomResizedCrop (bicubic), RandomHorizontalFlip, ToTensor and Normalize, one image
after the other. Ours: the batches of `train_batches`, normalised, as a training step gets them. All of it runs in one process on one
thread and takes turns, so that whatever slows the machine slows all; a ratio is one of each turn, and the median over turns counts.

    photos    a folder of full-size photos (--photos; default: images that are generated)
    resized   the same as shards made by `mae shard --resize 256`, against the textbook on the full-size photos
    cached    small images kept decoded in memory (--shards, CIFAR-10; default: rendered ones, which nobody needs to decode)

The error is the mean absolute difference to the textbook's crop of the same image by the same box, of 255, on the worst of the paths.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from photos import generate
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from mae import config as configuration
from mae.config import Config
from mae.data import crops
from mae.data.batch import normalise
from mae.data.loader import train_batches
from mae.data.sources import Source, file_of, open_splits

SIZE, SMALL = 224, 32  # pixels of a crop
CPU = torch.device("cpu")


def main() -> int:
    """Prints the comparison and, last, its figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="a folder of photos (default: 60 that are generated)")
    parser.add_argument("--shards", type=Path, help="tar shards of small images, such as CIFAR-10 (default: 4,000 that are rendered)")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 turns")
    options = parser.parse_args()
    turns = 3 if options.quick else options.turns
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        photos = options.photos or generate(Path(scratch) / "photos")
        resized = Path(scratch) / "resized"
        words = ["shard", str(photos), str(resized), "--resize", "256", "data.damage=0.2"]
        made = subprocess.run([sys.executable, "-m", "mae", *words], capture_output=True, text=True)
        if made.returncode:
            sys.exit(made.stderr)
        common = ["data.crop_scale=[0.2,1]", "data.flip=true", "data.validation=0.01", "data.workers=0", "train.batch_size=32"]
        folder = configuration.load(["configs/data/folder.yaml", f"data.path={photos}", f"data.image_size={SIZE}", *common])
        shards = configuration.load(["configs/data/shards.yaml", f"data.path={resized}", f"data.image_size={SIZE}", *common])
        small = ["configs/data/shards.yaml", f"data.path={options.shards}"] if options.shards else ["data.name=shapes", "data.length=4000"]
        cached = configuration.load([*small, f"data.image_size={SMALL}", "data.cache=ram", *common, "train.batch_size=1024"])
        print("decoding the small images once ...", flush=True)
        ways = {
            "textbook": _textbook(_paths(folder), SIZE),
            "photos": _ours(folder),
            "resized": _ours(shards),
            "textbook on small": _textbook(_small(cached), SMALL),
            "cached": _ours(cached),
        }
        # enough that both sides meet the same mixture of large and small photos in every turn
        counts = {"textbook": 256, "photos": 256, "resized": 512, "textbook on small": 2048, "cached": 1024 * 32}
        for run in ways.values():
            run(1024)  # caches, tables, memory
        took = {name: [] for name in ways}
        for turn in range(turns):
            for name, run in ways.items():
                took[name].append(_seconds(run, counts[name]))
            print(f"turn {turn + 1}: " + ", ".join(f"{name} {1 / took[name][-1]:,.0f}/s" for name in ways), flush=True)
        errors = {name: _error(cfg) for name, cfg in (("photos", folder), ("resized", shards), ("cached", cached))}

    figures: dict[str, object] = {"benchmark": "input_pipeline", "device": "cpu"}
    for name, beside in (("photos", "textbook"), ("resized", "textbook"), ("cached", "textbook on small")):
        ratios = sorted(slow / fast for slow, fast in zip(took[beside], took[name], strict=True))
        median = statistics.median(ratios)
        print(f"{name}: {median:.2f} times the textbook ({ratios[0]:.2f} to {ratios[-1]:.2f}), crops {errors[name]:.2f} of 255 apart")
        figures |= {f"{name}_ratio": round(median, 2), f"{name}_low": round(ratios[0], 2), f"{name}_high": round(ratios[-1], 2)}
        figures[f"{name}_images_per_second"] = round(1 / statistics.median(took[name]), 1)
    figures["textbook_images_per_second"] = round(1 / statistics.median(took["textbook"]), 1)
    figures |= {f"{name}_error": round(error, 3) for name, error in errors.items()}
    figures["crop_mean_abs_error"] = round(max(errors.values()), 3)
    print(json.dumps(figures))
    return 0


def _seconds(run: Callable[[int], None], count: int) -> float:
    """Seconds an image."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def _textbook(images: list[Path] | list[bytes] | list[Image.Image], size: int) -> Callable[[int], None]:
    """The pipeline of textbooks over files, files in memory, or decoded images."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    prepare = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    position = 0

    def run(count: int) -> None:
        nonlocal position
        batch = []
        for _ in range(count):
            image = images[position % len(images)]
            if not isinstance(image, Image.Image):
                image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB")
            batch.append(prepare(image))
            position += 1
            if len(batch) == 32:
                torch.stack(batch)
                batch.clear()

    return run


def _ours(cfg: Config) -> Callable[[int], None]:
    """The same number of images as a training step gets them."""
    source = open_splits(cfg.data).train
    batches = train_batches(source, cfg, first_step=0, device=CPU)

    def run(count: int) -> None:
        for _ in range(count // cfg.train.batch_size):
            for batch in next(batches):
                normalise(batch.images, cfg.data)

    return run


def _error(cfg: Config) -> float:
    """Mean absolute difference, of 255, of our crops to those that Pillow and torchvision make by the same boxes and flips."""
    source = open_splits(cfg.data).train
    (batch,) = next(train_batches(source, cfg, first_step=0, device=CPU))
    keys, ids = batch.keys.numpy(), batch.ids.tolist()
    images = batch.images
    if images.is_floating_point():  # normalised already
        images = 255 * (images * torch.tensor(cfg.data.std).view(-1, 1, 1) + torch.tensor(cfg.data.mean).view(-1, 1, 1))
    wanted = []
    for key, index in zip(keys, ids, strict=True):
        image = _pillow(source, index)
        box = crops.boxes(key[None], np.array([image.height]), np.array([image.width]), scale=(0.2, 1.0))[0]
        crop = F.resized_crop(image, *box.tolist(), list(cfg.image_size), transforms.InterpolationMode.BICUBIC)
        wanted.append(F.pil_to_tensor(F.hflip(crop) if crops.flips(key[None])[0] else crop))
    return (images.float() - torch.stack(wanted).float()).abs().mean().item()


def _pillow(source: Source, index: int) -> Image.Image:
    """What the textbook decodes."""
    content = file_of(source, index)
    return Image.fromarray(source.read(index)) if content is None else Image.open(io.BytesIO(content)).convert("RGB")


def _paths(cfg: Config) -> list[Path]:
    source = open_splits(cfg.data).train
    return [Path(str(cfg.data.path)) / source.name_of(i) for i in range(len(source))]


def _small(cfg: Config) -> list[bytes] | list[Image.Image]:
    source = open_splits(cfg.data).train
    return [file_of(source, i) or _pillow(source, i) for i in range(min(len(source), 2000))]


if __name__ == "__main__":
    sys.exit(main())
