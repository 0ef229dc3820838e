"""What can be said of ENCODER before torch is imported to look into it."""

from pathlib import Path

from mae.errors import ConfigError
from mae.nets import names

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def check(word: str) -> None:
    """Raises ConfigError for a word that means no encoder from elsewhere: an unknown name of timm's, a folder or file of another kind."""
    source, _, name = word.partition(":")
    if source == "timm":
        names.check(name, "timm:")
        return
    path = Path(name if source == "hf" else word).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is neither a run folder nor a model's: it has no config.yaml and no config.json")
    elif source == "hf":
        return
    elif not path.is_file():
        raise ConfigError(f"there is no {word}: give a run folder, a checkpoint file, timm:NAME or hf:NAME")
    elif path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} is no checkpoint that can be read: give a file ending in {', '.join(SUFFIXES)}")
