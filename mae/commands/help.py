"""The help page of a command: its usage and every key that it takes with its default, type and meaning."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from mae import config
from mae.keys import FOLDER_OF, FREE, SECTIONS, spelt
from mae.kinds import said, shown

OWN = "(own)"  # the default of a key that a run or an encoder brings
DOORS = r"\b(pretrain|finetune|linear_probe)\.py\b"
KEYS, TYPES = 40, 9  # widths of the columns
NAMES = {int: "integer", float: "number", bool: "boolean", str: "text"}
WORDS = "Words: files (.yaml) and overrides (section.key=value), merged left to right. Keys and defaults:"
FEW = f"Words: section.key=value. Keys and defaults; {OWN} is what the run or the encoder has:"
OF_ENCODER = "encoder.* and method.* are ENCODER's, and so is data.* where no word says otherwise (below: the digits')."
Keys = Sequence[str] | Mapping[str, str]


def page(usage: str, words: Sequence[str], protocol: str | None, *, keys: Keys = tuple(SECTIONS), of_encoder: bool = False) -> str:
    """Usage, then the keys of some sections, or some keys by name with their defaults.

    The method and protocol are those that the words choose, `protocol` before them. `of_encoder`: of a command that is given an encoder,
    which decides sections of its own. On a terminal lines are wrapped to its width.
    """
    usage = _filled(usage)
    if not keys:
        return usage
    if isinstance(keys, Mapping):
        return "\n".join([usage, "", _filled(FEW), *(_line_of(key, default) for key, default in keys.items())])
    files = [w for w in words if "=" in w or w.endswith(".yaml")]
    chosen = config.load([f"configs/evaluation/{protocol}.yaml", *files] if protocol else files)
    shipped = [folder for section, folder in FOLDER_OF.items() if section in keys and not (of_encoder and section == "method")]
    shipped += ["recipes"] if set(keys) == set(SECTIONS) and not of_encoder else []
    lines = [usage, *([""] if shipped else []), *map(_shipped, shipped), "", *map(_filled, [WORDS, OF_ENCODER] if of_encoder else [WORDS])]
    for section in keys:
        name = getattr(chosen, section).get("name") if section in FREE else None
        if (section in FREE and name is None) or (of_encoder and section in ("encoder", "method")):
            continue
        values, types = chosen.as_dict()[section], _types(section)
        lines += ["", _bold(section + (f" ({name})" if name else ""))]
        for key, doc in config.docs(section, name).items():
            kind, doc = said(doc)
            lines.append(_line(f"{section}.{key}={shown(values.get(key))}", _type(types.get(key) or kind, values.get(key), doc), doc))
    return "\n".join(lines)


def spoken(usage: str, *, as_tool: bool) -> str:
    """A usage text for those who say `mae pretrain`, where it speaks of pretrain.py."""
    if not as_tool:
        return usage.strip()
    return re.sub(DOORS, r"mae \1", re.sub(rf"(torchrun [^\n]*?){DOORS}", r"\1-m mae \2", usage)).strip()


def _filled(usage: str) -> str:
    """A usage text as it is written, or where a terminal is too narrow for that, its paragraphs and lists filled anew."""
    width = _width()
    if width is None or all(len(line) <= width for line in usage.split("\n")):
        return usage
    items: list[str] = []
    for line in usage.split("\n"):
        depths = [len(x) - len(x.lstrip()) for x in (items[-1] if items else "", line)]
        prose = depths == [0, 0] and not (items and items[-1].startswith("usage:"))
        if line and items and items[-1] and (prose or (depths[0] == 2 < depths[1])):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    heads = [re.match(r"usage: |  \S+(?: \S+)*  +|\s*", item) for item in items]  # always one, if an empty one
    return "\n".join(_wrapped(item, width, len(head[0]) if head else 0) for item, head in zip(items, heads, strict=True))


def _wrapped(line: str, width: int, indent: int) -> str:
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False))


def _width() -> int | None:
    """Characters of a line on the terminal; None where a file or a pipe is written to, one line a key, as grep likes it."""
    return max(shutil.get_terminal_size().columns, 80) if sys.stdout.isatty() else None


def _shipped(folder: str) -> str:
    names = " ".join(sorted(file.stem for file in (config.configs_folder() / folder).glob("*.yaml")))
    return "\n".join(textwrap.wrap(f"configs/{folder}/*.yaml: {names}", _width() or 120, subsequent_indent="  "))


def _types(section: str) -> dict[str, Any]:
    return {} if section in FREE else {spelt(f.name): f.type for f in fields(SECTIONS[section])}


def _type(declared: Any, value: object, doc: str) -> str:
    """'number', '[text]' ...; by the value where nothing is declared, and nothing for what only the sentence beside it can tell."""
    if re.match(r"[\w:]+ \| ", doc):
        return "choice"
    if declared is None or declared is Any:
        declared = list[type(value[0])] if isinstance(value, list) and value else type(value)  # type: ignore[misc]
        if value == "auto":
            declared = float
    inner = [t for t in get_args(declared) if t is not type(None)]
    if declared in NAMES:
        return NAMES[declared]
    name = NAMES.get(inner[0], "") if inner else ""
    return f"[{name}]" if getattr(declared, "__origin__", None) is list else name


def _line(key: str, kind: str, doc: str) -> str:
    head = f"  {key}".ljust(KEYS) + f"  {kind}".ljust(TYPES + 2)
    width = _width()
    return f"{head}  {doc}" if width is None else _wrapped(f"{head}  {doc}", width, KEYS + TYPES + 4)


def _line_of(key: str, default: str) -> str:
    section, _, name = key.partition(".")
    usual, doc = getattr(SECTIONS[section](), name), config.docs(section)[name]
    return _line(f"{key}={default}", _type(_types(section)[name], usual, doc), doc)


def _bold(heading: str) -> str:
    return f"\033[1m{heading}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else heading
