"""Words on the command line -> one frozen, typed configuration.

Words ending in .yaml are files, words with `=` are overrides; they are merged left to right onto the defaults. Nothing here
imports torch, so that help and configuration errors answer at once.
"""

import difflib
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from mae import checks, kinds
from mae.checks import DURATIONS
from mae.errors import ConfigError
from mae.keys import FOLDER_OF, FREE, SECTIONS, Config, spelt

TEXTS = (str, str | None)  # types of keys
LIMITS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
LIMIT = rf"({'|'.join(LIMITS)}) (-?[\d.]+)"


def configs_folder() -> Path:
    """The configs/ folder: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    beside = package.parent / "configs"
    return beside if (package.parent / "setup.cfg").exists() and beside.is_dir() else package / "configs"


def find_file(word: str, *, near: Path | None = None) -> Path:
    """The file that a .yaml word means: as a path, beside the including file, or among the packaged configs."""
    relative = word.removeprefix("configs/")
    places = [Path(word), *([near / word] if near else []), configs_folder() / relative]
    for place in places:
        if place.is_file():
            return place
    known = [str(p.relative_to(configs_folder())) for p in sorted(configs_folder().rglob("*.yaml"))]
    raise ConfigError(f"no file {word}{_did_you_mean(relative, known, prefix='configs/')}")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates a command's own arguments from the words that configure it: (arguments, configuration words)."""
    arguments = [w for w in words if "=" not in w and not w.endswith((".yaml", ".yml"))]
    return arguments, [w for w in words if w not in arguments]


def load(words: Sequence[str], *, base: Mapping[str, Any] | None = None) -> Config:
    """Merges files and `a.b=c` words, left to right, onto the defaults, and checks what can be checked from words alone.

    Without a data or method, the digits and the MAE are meant. `base` (nested, e.g. a run's config.yaml) replaces the defaults.
    Raises ConfigError for an unknown key or file, a wrong type or value, and settings that contradict each other.
    """
    layers = [layer for word in words for layer in _layers_of(word)]
    if base is not None:
        layers.insert(0, dict(base))
    defaults = [("data", "data/digits.yaml"), ("method", "methods/mae.yaml")]
    layers = [layer for section, file in defaults if not _named(layers, section) for layer in _read(find_file(file))] + layers

    merged: dict[str, Any] = {section: {} for section in SECTIONS}
    for layer in layers:
        _merge_layer(merged, layer)
    config = _typed(merged)
    checks.check(config)
    for name in config.evaluate.protocols:
        protocol(name)
    return config


def protocol(name: str) -> dict[str, Any]:
    """The settings of a protocol: a file of configs/evaluation by its name, or any file, with or without .yaml.

    Raises ConfigError where there is no such file or it holds no protocol.
    """
    word = name if name.endswith(".yaml") else f"configs/evaluation/{name}.yaml"
    layers = [layer["protocol"] for layer in _read(find_file(word)) if "protocol" in layer]
    if not layers:
        raise ConfigError(f"{word} holds no `protocol:` section: choose a file of configs/evaluation")
    return {k: v for layer in layers for k, v in layer.items()}


def names(words: Sequence[str], section: str) -> bool:
    """Whether some of the words choose what a section is about: `data.name=folder`, or a file that does."""
    return _named([layer for word in words for layer in _layers_of(word)], section)


def _named(layers: Sequence[Mapping[str, Any]], section: str) -> bool:
    return any("name" in (layer.get(section) or {}) for layer in layers)


def _layers_of(word: str) -> list[dict[str, Any]]:
    if word.endswith((".yaml", ".yml")) and "=" not in word:
        return _read(find_file(word))
    name, _, value = word.partition("=")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or not _:
        raise ConfigError(f"{word!r} is neither a .yaml file nor an override: write section.key=value")
    if "." not in name:
        known = [*all_keys({"method": {"name": "mae"}})]
        near = [k for k in known if k.endswith(f".{name}")]
        raise ConfigError(f"{name} is no key{': did you mean ' + near[0] + '?' if near else _did_you_mean(name, known)}")
    layer = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([word])))
    section, _, key = name.partition(".")
    if _declared(section).get(key) in TEXTS and isinstance(layer[section][key], bool | int | float):
        layer = {section: {key: value}}  # as it is written: run.dir=on is a folder's name, and so is 1e3
    if key == "name" and section in FOLDER_OF and value:
        return [*_read(_named_file(section, value)), layer]
    if name == "encoder.from" and value not in ("", "null"):
        return [{"encoder": _encoder_of(value)}, layer]
    return [layer]


def _encoder_of(word: str) -> dict[str, Any]:
    """The architecture of a run's encoder, or of any other that is there to be opened."""
    file = Path(word) / "config.yaml"
    if file.is_file():
        return {k: v for k, v in _read(file)[-1]["encoder"].items() if k not in ("from", "frozen")}
    from mae.interop import first_look

    first_look.check(word)
    from mae.interop.load import open_encoder  # torch: an encoder from elsewhere is known by its weights

    opened = open_encoder(word)
    as_named = {f.name: None for f in fields(SECTIONS["encoder"]) if f.name not in ("from_", "frozen")}
    return {**as_named, "name": opened.architecture, **opened.overrides}


def _named_file(section: str, name: str) -> Path:
    folder = configs_folder() / FOLDER_OF[section]
    file = folder / f"{name.replace('/', '_')}.yaml"
    if not file.is_file():
        known = [p.stem for p in sorted(folder.glob("*.yaml"))]
        raise ConfigError(f"{section}.name {name} is unknown{_did_you_mean(name, known)}")
    return file


def _read(file: Path) -> list[dict[str, Any]]:
    """The layers of a YAML file: those of the files under `base:` first, then its own."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file)) or {}
    except Exception as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold sections such as `data:` and `method:`, not a {type(content).__name__}")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    return [layer for word in bases for layer in _read(find_file(word, near=file.parent))] + [content]


def _merge_layer(merged: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for section, values in layer.items():
        if section not in SECTIONS:
            raise ConfigError(f"unknown section {section}{_did_you_mean(section, list(SECTIONS))}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{section} is a section of keys, not {values!r}: write {section}.key=value")
        if section in FOLDER_OF and "name" in values and values["name"] != merged[section].get("name"):
            merged[section] = dict(schema(section, str(values["name"]))) if section in FREE else {}
        if section == "train" and any(d in values for d in DURATIONS):
            merged["train"] = {k: v for k, v in merged["train"].items() if k not in DURATIONS}
        merged[section] = {**merged[section], **values}


def schema(section: str, name: str) -> dict[str, Any]:
    """Every argument of a method or protocol with its default: what the YAML of that name lists."""
    return dict(_read(_named_file(section, name))[-1][section])


def all_keys(merged: Mapping[str, Any]) -> dict[str, Any]:
    """Every dotted key that may be set, with its default, given the chosen method and protocol."""
    keys: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        if section in FREE:
            name = (merged.get(section) or {}).get("name")
            keys |= {f"{section}.{k}": v for k, v in (schema(section, name) if name else {}).items()}
        else:
            keys |= {f"{section}.{spelt(f.name)}": _default(f) for f in fields(cls)}
    return keys


def docs(section: str, name: str | None = None) -> dict[str, str]:
    """The line of help of every key of a section; for methods and protocols the comments of their YAML."""
    if section not in FREE:
        return {spelt(f.name): f.metadata["doc"] for f in fields(SECTIONS[section])}
    text = _named_file(section, name or "mae").read_text()
    lines = re.findall(r"^  (\w+):[^#\n]*#\s*(.+)$", text, re.MULTILINE)
    return dict(lines)


def _declared(section: str) -> dict[str, Any]:
    """The types of a section's keys, where it has some."""
    return {spelt(f.name): f.type for f in fields(SECTIONS[section])} if section in SECTIONS and section not in FREE else {}


def _default(f: Any) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()


def _typed(merged: Mapping[str, Any]) -> Config:
    known = all_keys(merged)
    for section, values in merged.items():
        for name in values:
            if f"{section}.{name}" not in known:
                raise ConfigError(f"unknown key {section}.{name}{_did_you_mean(f'{section}.{name}', list(known))}")
    for section in FREE:
        said = docs(section, merged[section]["name"]) if merged[section] else {}
        for name, value in merged[section].items():
            _check_type(f"{section}.{name}", value, known[f"{section}.{name}"], kinds.said(said.get(name, ""))[0])
    # YAML reads the bare word off as false
    merged = {**merged, "track": {k: "off" if k == "wandb" and v is False else v for k, v in merged["track"].items()}}
    for section, values in merged.items():
        for name, declared in _declared(section).items():
            given = values.get(name)
            if (declared in TEXTS and isinstance(given, bool)) or (declared == list[str] and any(isinstance(x, bool) for x in given or ())):
                raise ConfigError(f"{section}.{name}={kinds.shown(given)} is no text: put it between quotes in the file")
    merged["encoder"] = {"from_" if k == "from" else k: v for k, v in merged["encoder"].items()}
    try:
        config = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(merged)))))
    except ValidationError as error:
        name = str(error.full_key).split("[")[0]  # data.mean[0] -> data.mean
        section, _, key = name.partition(".")
        raise ConfigError(kinds.refusal(name, merged[section][key], _declared(section)[key], known[name])) from error
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "configuration"
        default = known.get(where)
        example = f": the default is {default}" if default is not None else ""
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}{example}") from error
    for section, cls in SECTIONS.items():
        values = merged[section] if section in FREE else {spelt(k): v for k, v in vars(getattr(config, section)).items()}
        for name, doc in (docs(section, merged[section].get("name")) if values or is_dataclass(cls) else {}).items():
            _check_choice(f"{section}.{name}", values.get(name), doc)
            _check_range(f"{section}.{name}", values.get(name), known[f"{section}.{name}"], doc)
    return config


def _check_type(name: str, value: Any, default: Any, said: type | None) -> None:
    number = int | float
    if isinstance(default, bool):
        fine = isinstance(value, bool)
    elif default == "auto":
        fine = value == "auto" or isinstance(value, number)  # a bool is a number here
    elif isinstance(default, float):
        fine = isinstance(value, number) and not isinstance(value, bool)
    elif default is None:
        fine = value is None or said is None or (isinstance(value, number if said is float else said) and not isinstance(value, bool))
    else:
        fine = isinstance(value, type(default)) and not isinstance(value, bool)
    if not fine:
        raise ConfigError(kinds.refusal(name, value, "auto" if default == "auto" else said or type(default), default))


def _check_choice(name: str, value: Any, doc: str) -> None:
    head = doc.split(":")[0].split(";")[0]
    choices = [c.strip() for c in head.split("|")] if " | " in head else []
    if value is None or not choices or not all(re.fullmatch(r"[\w:]+", c) for c in choices):
        return
    if kinds.shown(value) not in choices and name != "train.device":
        raise ConfigError(f"{name} {kinds.shown(value)!r} is unknown{_did_you_mean(kinds.shown(value), choices)}")


def _check_range(name: str, value: Any, default: Any, doc: str) -> None:
    """A line of help that begins with limits, as in 'above 0, at most 1: ...', means them of a number, and of each in a list."""
    head = doc.split(":")[0]
    if not re.fullmatch(f"{LIMIT}(, {LIMIT})*", head):
        return
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not all(LIMITS[word](number, float(limit)) for word, limit in re.findall(LIMIT, head)):
            raise ConfigError(f"{name} {number} must be {head.replace(', ', ' and ')}: the default is {kinds.shown(default)}")


def _did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    if near:
        return f": did you mean {prefix}{near[0]}?"
    return f": choose one of {', '.join(known)}" if len(known) <= 12 else ": --help lists them"
