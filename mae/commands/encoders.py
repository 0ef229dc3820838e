"""ENCODER on the command line: what it is, what it was trained on, and what a command shall do with it."""

from pathlib import Path

from mae import config
from mae.config import Config
from mae.data.sources import Splits
from mae.errors import ConfigError
from mae.training.run import RunFolder


def configure(words: list[str], *, kind: str, default: str) -> tuple[Config, RunFolder]:
    """A supervised command's words -> its configuration and the run whose encoder is meant.

    Data, encoder, method and tracking are those of the run, the rest comes from the protocol's file (`default` where the words name none)
    and from the words. Raises ConfigError for a word that is no run, and for a protocol of another kind.
    """
    arguments, words = config.split_words(words)
    if len(arguments) != 1:
        given = f"not {' '.join(arguments)}" if arguments else "such as runs/digits-mae"
        raise ConfigError(f"which encoder? Give the folder of one run, {given}")
    folder = run_folder(Path(arguments[0]))
    trained_with = folder.config() or {}
    base = {section: trained_with[section] for section in ("data", "encoder", "method", "track")}
    # seed, number format and device are the run's; a protocol on extracted features trains nothing, others bring their own length
    base["train"] = {"steps": 1, **{key: trained_with["train"][key] for key in ("seed", "precision", "device")}}
    files = [w for w in words if "=" not in w]
    if not any("evaluation" in config.find_file(w).parts for w in files):
        words = [f"configs/evaluation/{default}.yaml", *words]
    cfg = config.load(words, base=base)
    name = str(cfg.protocol["name"])
    if name.split("/")[0] != kind:
        raise ConfigError(f"protocol {name} is not for this command: choose a {kind} file of configs/evaluation")
    return cfg, folder


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
        raise ConfigError(f"{where} has no class labels: sort the images into one folder a class")
    if splits.test is None:
        raise ConfigError(f"{where} has no test images: add a folder test/ beside train/")
