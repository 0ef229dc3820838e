"""The story of `mae data`: what will be trained on, seen before anything is trained."""

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mae import config
from mae.commands import door, options
from mae.config import Config
from mae.data.sources import Source, Splits, open_splits
from mae.errors import ConfigError
from mae.units import size

USAGE = """
usage: mae data [FILE.yaml ...] [section.key=value ...] [--images N] [--out DIR]

Shows what pretrain.py with the same words would train on: how many images, of which sizes, kinds and classes, which cannot be read, and
whether the loader keeps up with the model on this machine. Writes into DIR:

  contact_sheet.png   some images, two crops of each as two epochs give them, and what the model sees of the first
  data.json           the figures, and every image looked at that cannot be read

  --images N          whole number (2000): images that are looked into, evenly drawn from all splits
  --out DIR           folder (data-NAME)
"""
LOOKED_AT = 2000  # images
PICTURED = 8
FEWEST = 4  # images that the model is timed with, at first
SECONDS = 4.0  # the loader and the model are timed for so long each
BARS = 12  # classes shown one by one
SHOWN = 10  # unreadable images on the screen


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words)


def _story(words: list[str]) -> None:
    _, numbers, texts, words = options.pick(words, numbers={"images": LOOKED_AT}, texts=("out",))
    arguments, words = config.split_words(words)
    if arguments:
        raise ConfigError(f"{arguments[0]!r} is neither a .yaml file nor an override: write section.key=value")
    cfg = config.load(words)
    splits = open_splits(cfg.data)
    folder = Path(texts.get("out", f"data-{cfg.data.name}"))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: choose another --out")

    counts = {name: len(split) for name, split in zip(splits._fields, splits, strict=True) if split is not None}
    print(f"{cfg.data.name}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()) + " images")
    figures: dict[str, Any] = {"images": counts, "fingerprint": splits.train.fingerprint}
    figures |= _seen(cfg, splits, numbers["images"] or LOOKED_AT)
    figures["classes"] = _balance(splits)
    folder.mkdir(parents=True, exist_ok=True)
    sheet = _sheet(cfg, splits, folder / "contact_sheet.png")
    figures["images_per_second"] = _pace(cfg, splits)
    (folder / "data.json").write_text(json.dumps(figures, indent=1))
    print(f"\n{sheet}, {folder / 'data.json'}")


def _seen(cfg: Config, splits: Splits, limit: int) -> dict[str, Any]:
    """Sizes, kinds and damage of the images of all splits, or of some drawn evenly."""
    from mae.data import substitute, survey
    from mae.data.decode import DamagedImage

    parts = {name: split for name, split in zip(splits._fields, splits, strict=True) if split is not None}
    everything = sum(len(split) for split in parts.values())
    share = min(limit / everything, 1)
    drawn = {
        name: np.unique(np.linspace(0, len(s) - 1, max(round(share * len(s)), 1)).round().astype(np.int64)) for name, s in parts.items()
    }
    count = sum(len(ids) for ids in drawn.values())
    looks: list[survey.Look] = []
    damaged: list[tuple[str, DamagedImage]] = []
    with tqdm(total=count, unit="image", desc="looking", disable=None, leave=False) as bar:
        for name, split in parts.items():
            for look in survey.survey(split, drawn[name], threads=max(cfg.data.workers, 1)):
                bar.update()
                if isinstance(look, DamagedImage):
                    damaged.append((name, look))
                else:
                    looks.append(look)
    print(f"  looked at    {f'all {count:,} images' if count == everything else f'{count:,} of them, evenly drawn'}")
    lines = [f"\n    {name}: {damage}" for name, damage in damaged]
    print(
        f"  unreadable   {len(damaged):,}"
        + "".join(lines[:SHOWN])
        + (f"\n    ... and {len(lines) - SHOWN:,} more" if lines[SHOWN:] else "")
    )
    if not substitute.within(sum(name == "train" for name, _ in damaged), len(drawn["train"]), cfg.data.damage):
        print(f"    more than data.damage={cfg.data.damage:g} of the training images, which would stop a run: repair, remove or allow more")
    if not looks:
        raise ConfigError(f"none of {count} images can be read: check data.path")
    sides = np.array([look.size for look in looks])
    print(f"  height       {_spread(sides[:, 0])} pixels (least / median / most)")
    print(f"  width        {_spread(sides[:, 1])} pixels")
    print(f"  kind         {_kinds(looks)}")
    sizes = [look.content for look in looks if look.content is not None]
    if sizes:
        print(f"  files        {np.mean(sizes) / 1024:,.0f} KiB each on average, about {size(float(np.mean(sizes)) * everything)} in all")
    return {
        "looked_at": count,
        "unreadable": [[name, d.name, d.reason] for name, d in damaged],
        "height": np.quantile(sides[:, 0], [0, 0.05, 0.5, 0.95, 1]).tolist(),
        "width": np.quantile(sides[:, 1], [0, 0.05, 0.5, 0.95, 1]).tolist(),
        "kinds": {kind: sum(look.kind == kind for look in looks) for kind in sorted({look.kind for look in looks})},
    }


def _spread(values: np.ndarray) -> str:
    """'156 / 375 / 1,600': least, median and most."""
    return " / ".join(f"{round(v):,}" for v in (values.min(), np.median(values), values.max()))


def _kinds(looks: list[Any]) -> str:
    """'JPEG RGB 98%, JPEG L 2%', the commonest first."""
    counted = Counter(look.kind for look in looks).most_common()
    shares = [f"{kind} {100 * count / len(looks):.3g}%" for kind, count in counted[:5]]
    return counted[0][0] if len(counted) == 1 else ", ".join(shares) + (", ..." if len(counted) > 5 else "")


def _balance(splits: Splits) -> dict[str, int]:
    """How many training images each class has."""
    labels, names = splits.train.labels, splits.train.classes
    if labels is None or names is None:
        print("  classes      none: the images are not labelled")
        return {}
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    rare, common = counts.argmin(), counts.argmax()
    summary = f"{len(names)}, from {counts[rare]:,} images ({names[rare]}) to {counts[common]:,} ({names[common]})"
    print(f"  classes      {summary}; naming the commonest is right {100 * counts.max() / max(counts.sum(), 1):.1f}% of the time")
    for number in range(len(names) if len(names) <= BARS else 0):
        print(f"    {names[number][:24]:<24} {counts[number]:>9,} {'#' * round(30 * counts[number] / counts.max())}")
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def _sheet(cfg: Config, splits: Splits, file: Path) -> Path:
    """Draws the contact sheet: a row an image as evaluation sees it, two epochs' crops, and what the model sees of the first."""
    import torch
    from PIL import Image

    from mae.data.batch import normalise
    from mae.data.loader import TrainSteps, evaluation_batches
    from mae.data.sources import Subset
    from mae.evaluation import canvas, drawing
    from mae.methods.build import build
    from mae.nets import vit
    from mae.nets.keyed import hash_integers

    cpu = torch.device("cpu")
    ids = _readable(splits.train, PICTURED)
    (whole,) = evaluation_batches(Subset(splits.train, ids), cfg, batch_size=len(ids), device=cpu)
    steps = TrainSteps(splits.train, cfg, 0, 1, None)
    rows = [("evaluation", canvas.colours(normalise(whole.images, cfg.data), cfg))]
    crops = []
    for epoch in range(2):
        keys = hash_integers(cfg.train.seed, epoch, ids)
        read = steps.read(ids, keys)
        if isinstance(read, ConfigError):
            raise read
        crops.append((normalise(read.images, cfg.data), torch.from_numpy(keys)))
        rows.append((f"epoch {epoch + 1}", canvas.colours(crops[-1][0], cfg)))
    method = build(cfg)
    if hasattr(method, "predict"):
        images, drawn_by = crops[0]
        with torch.no_grad():
            _, hidden = method.predict(images, keys=drawn_by)
        patch, grid = method.encoder.patch_embed.patch_size, method.encoder.patch_embed.grid_size
        seen = vit.patchify(torch.from_numpy(rows[1][1]).permute(0, 3, 1, 2), patch)
        seen[hidden] = 0.5
        rows.append(("seen", vit.unpatchify(seen, grid, patch).permute(0, 2, 3, 1).numpy()))
    Image.fromarray(drawing.image_rows(rows, caption=canvas.captioned("", cfg))).save(file)
    return file


def _readable(source: Source, count: int) -> np.ndarray:
    """(M,) int64, evenly drawn images; of those that cannot be read the next ones, or none."""
    from mae.data.decode import DamagedImage

    chosen: list[int] = []
    for first in np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64)).tolist():
        for index in range(max(first, chosen[-1] + 1 if chosen else 0), min(first + count, len(source))):
            with contextlib.suppress(DamagedImage):
                source.read(index)
                chosen.append(index)
                break
    if not chosen:
        raise ConfigError(f"too few of the {len(source):,} training images can be read to show some: check data.path")
    return np.array(chosen)


def _pace(cfg: Config, splits: Splits) -> dict[str, float | None]:
    """Images a second that the loader gives and that the model takes, here; None where the method learns nothing step by step."""
    import torch

    from mae.data.loader import train_batches
    from mae.training import distributed

    logging.getLogger("mae").addFilter(lambda record: "takes its place" not in record.getMessage())  # they have been named
    with distributed.start(cfg.train.device, cfg.train.timeout) as ranks:
        batches = train_batches(splits.train, cfg, first_step=0, device=ranks.device)
        batch = next(batches)[0]
        loader = _timed(lambda _: next(batches), cfg.train.batch_size, ranks.device)
        batches.close()
        torch.manual_seed(cfg.train.seed)
        model = _model_pace(cfg, batch, ranks.device)
    print(f"  loader       {loader:,.0f} images/s with data.workers={cfg.data.workers}, data.cache={cfg.data.cache}")
    if model is None:
        return {"loader": loader, "model": None}
    verdict = "it keeps up" if loader > 1.2 * model else "it holds the model up: more data.workers, data.cache=ram, or `mae shard --resize`"
    print(f"  model        {model:,.0f} images/s on {ranks.device}: {verdict}")
    return {"loader": loader, "model": model}


def _model_pace(cfg: Config, batch: Any, device: Any) -> float | None:
    """Images a second of whole training steps on (a part of) a batch; None for a method without any."""
    from mae.data.batch import normalise
    from mae.methods.build import build
    from mae.nets import precision
    from mae.nets.vit import choose_attention
    from mae.training import optim

    model = build(cfg).to(device)
    choose_attention(model, device)
    if not model.learns:
        return None
    kind = precision.choose(cfg.train.precision, device)
    optimizer = optim.create(model, cfg.optim, kind)

    def step(count: int) -> None:
        with precision.computing(kind, device):
            model(normalise(batch.images[:count], cfg.data), keys=batch.keys[:count]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = len(batch.images)
    before, count, spent = 0, min(FEWEST, whole), 0.0
    step(count)  # not timed: the first one is slower
    earlier, took = 0.0, count / _timed(step, count, device, seconds=0)
    while count < whole and (not before or spent + 2 * took < 3 * SECONDS):  # a whole batch may take minutes on a CPU
        before, earlier, count, spent = count, took, min(2 * count, whole), spent + took
        took = count / _timed(step, count, device, seconds=0)
    if count == whole:
        return _timed(step, whole, device)
    an_image = max(took - earlier, 0.0) / (count - before)  # the optimizer's part does not grow with the images
    return whole / (took + an_image * (whole - count))


def _timed(act: Callable[[int], Any], images: int, device: Any, seconds: float | None = None) -> float:
    """Images a second of an act that handles so many, once or repeated for SECONDS."""
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began, count = now(), 0
    while (passed := now() - began) < (SECONDS if seconds is None else seconds) or not count:
        act(images)
        count += 1
    return images * count / passed
