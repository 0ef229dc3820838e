"""Photos for benchmarks where nobody gives real ones: smooth waves under noise, 500 x 375 pixels, about as hard to decode."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def generate(folder: Path, count: int = 60) -> Path:
    """So many JPEGs in a new folder, which is returned."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:375, :500]

    def draw_one(number: int) -> None:
        draw = np.random.default_rng(number)
        waves = sum(30 * np.sin(x[..., None] * draw.normal(0, 0.1, 3) + y[..., None] * draw.normal(0, 0.1, 3)) for _ in range(5))
        pixels = np.clip(127 + waves + draw.normal(0, 12, (375, 500, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=92)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy and Pillow leave the interpreter to the others
        list(pool.map(draw_one, range(count)))
    return folder


def jpeg_shards(folder: Path, count: int) -> Path:
    """The same as JPEG shards, made by the program's own command; returns their folder."""
    photos, shards = generate(folder / "photos", count), folder / "shards"
    words = [sys.executable, "-m", "mae", "shard", str(photos), str(shards)]
    made = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if made.returncode:
        raise SystemExit(made.stderr)
    return shards
