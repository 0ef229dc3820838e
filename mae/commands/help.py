"""The help page of a command: its usage and every key with its default, type and meaning."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from mae import config
from mae.keys import FREE, SECTIONS, spelt
from mae.kinds import shown

DOORS = r"\b(pretrain|finetune|linear_probe)\.py\b"
KEYS, TYPES = 40, 9  # widths of the columns
NAMES = {int: "integer", float: "number", bool: "boolean", str: "text"}
WORDS = "Words: files (.yaml) and overrides (section.key=value), merged left to right. Keys and defaults:"
OF_ENCODER = "encoder.* and method.* are ENCODER's, and so is data.* where no word says otherwise (below: the digits')."


def page(usage: str, words: Sequence[str], protocol: str | None, *, of_encoder: bool = False) -> str:
    """Usage, then all keys; the method and protocol are those that the words choose, `protocol` before them.

    `of_encoder`: of a command that is given an encoder, which decides sections of its own. On a terminal lines are wrapped to its width.
    """
    files = [w for w in words if "=" in w or w.endswith(".yaml")]
    chosen = config.load([f"configs/evaluation/{protocol}.yaml", *files] if protocol else files)
    shipped = ("evaluation",) if of_encoder else ("methods", "evaluation", "recipes")
    lines = [usage, "", *map(_shipped, shipped), "", WORDS, *([OF_ENCODER] if of_encoder else [])]
    for section in SECTIONS:
        name = getattr(chosen, section).get("name") if section in FREE else None
        if (section in FREE and name is None) or (of_encoder and section in ("encoder", "method")):
            continue
        values, types = chosen.as_dict()[section], _types(section)
        lines += ["", _bold(section + (f" ({name})" if name else ""))]
        for key, doc in config.docs(section, name).items():
            lines.append(_line(f"{section}.{key}={shown(values.get(key))}", _type(types.get(key), values.get(key), doc), doc))
    return "\n".join(lines)


def spoken(usage: str, *, as_tool: bool) -> str:
    """A usage text for those who say `mae pretrain`, where it speaks of pretrain.py."""
    if not as_tool:
        return usage.strip()
    return re.sub(DOORS, r"mae \1", re.sub(rf"(torchrun [^\n]*?){DOORS}", r"\1-m mae \2", usage)).strip()


def _shipped(folder: str) -> str:
    names = " ".join(sorted(file.stem for file in (config.configs_folder() / folder).glob("*.yaml")))
    return "\n".join(textwrap.wrap(f"configs/{folder}/*.yaml: {names}", 120, subsequent_indent="  "))


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
    if not sys.stdout.isatty():  # one line a key, as grep likes it
        return f"{head}  {doc}"
    indent = " " * (KEYS + TYPES + 4)
    width = max(shutil.get_terminal_size().columns, 100)
    return "\n".join(textwrap.wrap(f"{head}  {doc}", width, subsequent_indent=indent, break_long_words=False, drop_whitespace=True))


def _bold(heading: str) -> str:
    return f"\033[1m{heading}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else heading
