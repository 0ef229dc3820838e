"""ENCODER on the command line: what it is, what it was trained on, and what a command shall do with it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae import config
from mae.config import Config
from mae.data.sources import Splits
from mae.errors import ConfigError
from mae.interop import first_look
from mae.keys import Encoder
from mae.training.run import RunFolder

if TYPE_CHECKING:  # a wrong word is answered before torch is imported
    from mae.methods.base import Autoencoder

ARCHITECTURE = [f.name for f in dataclasses.fields(Encoder) if f.name not in ("from_", "frozen")]
OF_ENCODER = ("image_size", "channels", "mean", "std")  # what of an image the encoder has been made for


@dataclasses.dataclass(frozen=True)
class Found:
    """An encoder, wherever it came from."""

    name: str  # in the entries of results.json
    home: RunFolder  # where results go
    base: dict[str, Any]  # the configuration that it brings
    load: Callable[[], "Autoencoder"]  # in eval mode


def find(word: str) -> Found:
    """The encoder that a word means: a run folder, timm:NAME, hf:NAME or a checkpoint file.

    Raises ConfigError where there is none, or nothing trained in a run.
    """
    path = Path(word)
    if (path / "config.yaml").exists() or not (path.exists() or word.startswith(("timm:", "hf:"))):
        folder = run_folder(path)
        if (classifier := folder.classifier()) is not None:
            return find(str(classifier))
        trained_with = folder.config() or {}
        base = {section: trained_with[section] for section in ("data", "encoder", "method", "track")}
        # seed, number format and device are the run's; a protocol on extracted features trains nothing, others bring their own length
        base["train"] = {"steps": 1, **{key: trained_with["train"][key] for key in ("seed", "precision", "device")}}
        return Found(folder.path.name, folder, base, lambda: _load_run(folder))

    first_look.check(word)  # before torch is imported
    from mae.interop.load import open_encoder

    opened = open_encoder(word)
    name = word.replace(":", "-").strip("/").replace("/", "-").removesuffix(".safetensors").removesuffix(".pth").removesuffix(".pt")
    base = {
        "data": {
            "image_size": list(opened.image_size),
            "channels": opened.channels,
            "mean": list(opened.mean),
            "std": list(opened.std),
            "resize": opened.resize,
        },
        "encoder": {"name": opened.architecture, "from": word, **opened.overrides},
        "method": {"name": "untrained"},
        "train": {"steps": 1},
    }
    return Found(word, RunFolder(Path("runs") / name), base, opened.model.eval)


def configure(words: Sequence[str], base: dict[str, Any]) -> Config:
    """The configuration of a command over an encoder that brings `base`.

    The words may name other images (transfer): they are then read in the size, channels and normalisation that the encoder has been
    made for, unless a word says otherwise. The architecture is always the encoder's.
    """
    if "name" not in base["data"] and not config.names(words, "data"):
        raise ConfigError("on which images? Name them: configs/data/cifar10.yaml data.path=DIR, or configs/data/folder.yaml data.path=DIR")
    said = {w.split("=")[0].removeprefix("data.") for w in words if w.startswith("data.")}
    kept = [k for k in OF_ENCODER if k not in said and not (k in ("mean", "std") and "channels" in said)]
    facts = [f"data.{k}={json.dumps(base['data'][k])}" for k in kept]
    facts += [f"encoder.{k}={json.dumps(base['encoder'].get(k))}" for k in ARCHITECTURE]
    given = config.load([*words, *facts], base=base)
    start = {"from_": base["encoder"].get("from"), "frozen": base["encoder"].get("frozen", False)}
    return dataclasses.replace(given, encoder=dataclasses.replace(given.encoder, **start))


def supervised(words: list[str], *, kind: str, default: str) -> tuple[Config, Found]:
    """A supervised command's words -> its configuration and the encoder that is meant.

    Data, encoder, method and tracking are those of the run, the rest comes from the protocol's file (`default` where the words name none)
    and from the words. Raises ConfigError for a word that is no encoder, and for a protocol of another kind.
    """
    word, words = one_encoder(words)
    found = find(word)
    if not evaluations(words):
        words = [f"configs/evaluation/{default}.yaml", *words]
    cfg = configure(words, found.base)
    name = str(cfg.protocol["name"])
    if name.split("/")[0] != kind:
        raise ConfigError(f"protocol {name} is not for this command: choose a {kind} file of configs/evaluation")
    return cfg, found


def one_encoder(words: Sequence[str]) -> tuple[str, list[str]]:
    """The only word that is neither a file nor an override, and the others. Raises ConfigError for none or several."""
    checkpoints = [w for w in words if w.endswith((".safetensors", ".pth", ".pt"))]
    arguments, words = config.split_words([w for w in words if w not in checkpoints])
    arguments += checkpoints
    if len(arguments) != 1:
        given = f"not {' '.join(arguments)}" if arguments else "such as runs/digits-mae"
        raise ConfigError(f"which encoder? Give one: the folder of a run, a checkpoint file, timm:NAME or hf:NAME, {given}")
    return arguments[0], words


def evaluations(words: Sequence[str]) -> list[str]:
    """The words that are files of a protocol."""
    return [w for w in words if w.endswith((".yaml", ".yml")) and "=" not in w and config.names([w], "protocol")]


def run_folder(path: Path) -> RunFolder:
    """The run at a path. Raises ConfigError where there is none, or nothing trained in it."""
    folder = RunFolder(path)
    hint = "give the folder of a run, such as runs/digits-mae"
    if not path.exists():
        raise ConfigError(f"there is no {path}: {hint}")
    if folder.config() is None:
        raise ConfigError(f"{path} is no run folder, it has no config.yaml: {hint}")
    if not any(folder.checkpoints.glob("step-*/manifest.json")):
        raise ConfigError(f"{path} has no checkpoint yet: run pretrain.py first")
    return folder


def require_labels(cfg: Config, splits: Splits) -> None:
    """Raises ConfigError where the images have no classes or none of them are for testing."""
    where = cfg.data.path or cfg.data.name
    if splits.train.classes is None:
        raise ConfigError(f"{where} has no class labels: sort some into a folder a class and say configs/data/folder.yaml data.path=DIR")
    if splits.test is None:
        raise ConfigError(f"{where} has no test images: add a folder test/ beside train/")


def _load_run(folder: RunFolder) -> "Autoencoder":
    import mae

    return mae.load(folder.path)
