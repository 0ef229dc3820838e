"""Protocols in, results.json entries out: one pass over the images for all of them, each beside its controls."""

import importlib
import inspect
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from mae.config import Config
from mae.data.sources import Splits
from mae.errors import ConfigError
from mae.evaluation import layers, tokens
from mae.evaluation.controls import Control, define
from mae.evaluation.features import ALONE, LAYERS, TOKENS, Share, digest, encoder_hash, encodes_itself, transform_of, write_atomically
from mae.evaluation.features import VERSION as FEATURES
from mae.evaluation.material import Result
from mae.evaluation.subject import Subject
from mae.methods.base import Autoencoder
from mae.version import __version__

Entry = dict[str, Any]


def run_protocols(
    model: Autoencoder,
    config: Config,
    splits: Splits,
    protocols: Sequence[Mapping[str, Any]],
    *,
    run_dir: Path,
    device: torch.device | str,
    controls: bool,
    untrained: Callable[[], Autoencoder],
    precision: str = "fp32",
    name: str | None = None,
    share: Share = ALONE,
    open_other: Callable[[str], tuple[Autoencoder, Config]] | None = None,
    say: Callable[[str], None] = print,
    drawn: Callable[[Path], object] = lambda file: None,
) -> list[Entry]:
    """Measures an encoder by every protocol (`config.protocol` dicts) and returns the entries, each followed by its controls' entries.

    An evaluator is a module with evaluate(material, **settings) -> Result, VERSION and NEEDS_LABELS; with OF_MODEL = True it is given
    the Subject instead, and READS may name what else than the features of all images it looks at. One pass over the images reads both,
    for all protocols; only those that run the model otherwise (on hidden patches, to decode) make passes of their own. Pictures go to
    the run's figures/ (`drawn` is told each file), which test images were right to predictions/. Features and the controls' entries are
    kept in `.cache/` beside the run folder, shared by all runs there. A protocol that this data cannot serve (no labels, no test split,
    too few images of a class) is skipped, and `say` is told why.
    `name` is the encoder's in the entries (default: the run folder's). Where several processes share the images out (`share`), each
    has all entries. `open_other` opens another encoder for a protocol that compares two. Raises ConfigError for a protocol that does
    not exist or does not work on features.
    """
    evaluators = [(dict(protocol), evaluator(protocol)) for protocol in protocols]
    kept = Path(run_dir).parent / ".cache"
    subject = Subject(model, config, splits, torch.device(device), precision, kept / "features", share, open_other=open_other)
    subject = replace(subject, also=_also([module for _, module in evaluators], subject))
    identity = {"name": name or Path(run_dir).name, "method": config.method.get("name"), "hash": encoder_hash(model)}
    identity |= {"architecture": config.encoder.name, "width": model.encoder.embed_dim, "precision": precision}
    data = data_name(config, splits)
    beside = cache(lambda: define(subject, untrained))
    entries: list[Entry] = []
    for protocol, module in evaluators:
        why = _unfit(module, splits)
        if why:
            say(f"{protocol['name']} is skipped: {why}")
            continue
        common = {"protocol": protocol["name"], "protocol_hash": digest(protocol, module.VERSION, FEATURES), "data": data, "split": "test"}
        of_model = getattr(module, "OF_MODEL", False)
        try:
            own, result = _measure(
                module, protocol, (lambda: subject) if of_model else (lambda: subject.material), identity, config.train.seed
            )
        except ConfigError as error:
            say(f"{protocol['name']} is skipped: {error}")
            continue
        entries.append(_with_correct(common | own, result, Path(run_dir)))
        for title, picture in result.pictures.items():
            file = Path(run_dir) / "figures" / f"{protocol['name'].replace('/', '-')}-{title}.png"
            write_atomically(file, partial(Image.fromarray(picture).save, format="PNG"))
            drawn(file)
        for control in beside() if controls else ():
            entry = _of_control(control, module, protocol, common, kept / "controls", subject)
            if entry is not None:
                entries.append(entry)
                copy_correct(entry, kept / "controls", Path(run_dir))
    return entries


def trained_entry(config: Config, splits: Splits, result: Result, *, encoder: str, seconds: float, run_dir: Path) -> Entry:
    """The entry of a protocol that trains on images (fine-tuning, the paper's linear probe), for the run named `encoder`.

    Such a protocol is its own section together with how it is trained, so all of that goes into its hash. Which test images were right
    goes to the run folder's predictions/.
    """
    recipe = config.as_dict()
    trained = {name: recipe["train"][name] for name in ("epochs", "steps", "minutes", "batch_size", "ema")}
    settings = recipe["protocol"] | {"optim": recipe["optim"], "train": trained, "transform": transform_of(config)}
    settings["transform"] |= {"crop_scale": recipe["data"]["crop_scale"], "flip": recipe["data"]["flip"]}
    entry = {
        "protocol": config.protocol["name"],
        "protocol_hash": digest(settings, FEATURES),
        "data": data_name(config, splits),
        "split": "test",
        "seed": config.train.seed,
        "metrics": dict(result.metrics),
        "encoder": {"name": encoder, "method": config.method.get("name"), "architecture": config.encoder.name},
        "settings": settings,
        "code": code_version(),
        "seconds": round(seconds, 3),
    }
    return _with_correct(entry, result, run_dir)


def add_entries(path: Path, entries: Sequence[Entry]) -> list[Entry]:
    """Adds entries to a results.json, made if it is missing, and returns all of its entries.

    An entry replaces an older one of the same protocol hash, data, seed and encoder. The file is rewritten atomically.
    """
    path = Path(path)
    known = json.loads(path.read_text()) if path.exists() else []
    together = {_identity(entry): entry for entry in [*known, *entries]}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(list(together.values()), indent=1)))
    return list(together.values())


def copy_correct(entry: Entry, source: Path, target: Path) -> None:
    """Copies the file that says which test images were right, where an entry of the folder `source` names one, to another folder."""
    if "correct" in entry and source != target:
        write_atomically(target / entry["correct"], lambda path: shutil.copyfile(source / entry["correct"], path))


def data_name(config: Config, splits: Splits) -> str:
    """`NAME@FINGERPRINT` of the images of all three splits."""
    return f"{config.data.name}@{digest(*(split.fingerprint if split is not None else None for split in splits))}"


def evaluator(protocol: Mapping[str, Any]) -> ModuleType:
    """The module of mae/evaluation that measures a protocol: knn, linear_probe ... by the part of its name before the slash."""
    name = str(protocol["name"])
    try:
        module = importlib.import_module(f"mae.evaluation.{name.split('/')[0]}")
        inspect.signature(module.evaluate).bind(None, **_arguments(protocol))
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise ConfigError(f"protocol {name} is not measured on features: leave it out of evaluate.protocols ({error})") from error
    return module


@lru_cache
def code_version() -> str:
    """`0.1.0+HASH` in a git checkout, `+dirty` with uncommitted changes; the version alone elsewhere."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not (root / ".git").exists():  # the package may be installed inside somebody else's checkout
            return __version__
        return f"{__version__}+{git('rev-parse', '--short', 'HEAD')}{'+dirty' if git('status', '--porcelain', '-uno') else ''}"
    except (OSError, subprocess.SubprocessError):
        return __version__


def _also(evaluators: Sequence[ModuleType], subject: Subject) -> tuple[str, ...]:
    """What the pass over the images keeps beside the features, for the protocols that look for it: as much as fits into memory."""
    encoder, images = subject.model.encoder, sum(len(split) for split in subject.splits if split is not None)
    wanted, bytes_of = {getattr(module, "READS", None) for module in evaluators}, {}
    if not encodes_itself(subject.model) and isinstance(encoder, VisionTransformer):
        vectors = len(encoder.blocks) * len(layers.pools_of(subject))
        bytes_of = {LAYERS: (4 * vectors, layers.KEEP_BYTES), TOKENS: (2 * encoder.patch_embed.num_patches, tokens.KEEP_BYTES)}
    return tuple(name for name, (size, most) in bytes_of.items() if name in wanted and size * encoder.embed_dim * images <= most)


def _measure(
    module: ModuleType, protocol: Mapping[str, Any], given: Callable[[], Any], encoder: dict[str, Any], seed: int
) -> tuple[Entry, Result]:
    """What an evaluator says of a material or a subject: as an entry, and all of it."""
    thing = given()  # features are shared by the protocols: not part of this one's seconds
    start = time.perf_counter()
    result = module.evaluate(thing, **_arguments(protocol))
    entry = {
        "seed": seed,
        "metrics": result.metrics,
        "encoder": encoder,
        "settings": _arguments(protocol) | {f"chosen_{name}": value for name, value in result.settings.items()},
        "code": code_version(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    return entry, result


def _of_control(
    control: Control, module: ModuleType, protocol: Mapping[str, Any], common: Entry, kept: Path, subject: Subject
) -> Entry | None:
    """A control's entry, measured where the folder `kept` does not hold it yet; None for a control that cannot do what is measured
    (raw pixels have no reconstruction).
    """
    file = kept / f"{digest(common, control.name, control.definition)}.json"
    if not subject.share.all(file.exists()):
        given = control.subject if getattr(module, "OF_MODEL", False) else lambda: control.material().to(subject.device)
        who = {"name": control.name, "hash": digest(control.definition), **control.definition}
        try:
            own, result = _measure(module, protocol, given, who, seed=0)
        except ConfigError:
            return None
        entry = _with_correct(common | own, result, kept)
        write_atomically(file, lambda path: path.write_text(json.dumps(entry, indent=1)))
    return json.loads(file.read_text())


def _with_correct(entry: Entry, result: Result, folder: Path) -> Entry:
    """The entry, naming a file in the folder that says which test images were right, where the evaluator knows: two encoders can then
    be compared image by image.
    """
    if not result.correct:
        return entry
    file = f"predictions/{digest(*_identity(entry))}.npz"

    def write(path: Path) -> None:
        with open(path, "wb") as stream:
            arrays: dict[str, Any] = dict(result.correct)  # the stubs take any name for allow_pickle, which is a bool
            np.savez_compressed(stream, **arrays)

    write_atomically(folder / file, write)
    return entry | {"correct": file}


def _unfit(module: ModuleType, splits: Splits) -> str | None:
    """Why the data cannot serve an evaluator, or None."""
    if splits.test is None:
        return "the data has no test split"
    if module.NEEDS_LABELS and (splits.train.labels is None or splits.test.labels is None):
        return "the images have no labels"
    return None


def _arguments(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in protocol.items() if name != "name"}


def _identity(entry: Entry) -> tuple[Any, ...]:
    return entry["protocol_hash"], entry["data"], entry["seed"], entry["encoder"].get("name"), entry["encoder"].get("hash")
