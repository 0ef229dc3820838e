"""The few `--name value` pairs that commands take besides their words."""

import re
from collections.abc import Mapping, Sequence

from mae.errors import ConfigError


def take(words: Sequence[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Separates `--name value` and `--name=value` from the other words: (values by name, the rest).

    Every name has to be given, once. Raises ConfigError for a missing or unknown one.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            rest.append(word)
        elif name not in names or name in found:
            known = " and ".join(f"--{n}" for n in names)
            raise ConfigError(f"{word} is {'given twice' if name in found else 'no option here'}: give {known}, once")
        elif equals or left:
            found[name] = value if equals else left.pop(0)
    for name in names:
        if not found.get(name):
            raise ConfigError(f"--{name} is missing: say it with --{name} {name.upper()}")
    return found, rest


def pick(
    words: Sequence[str], flags: Sequence[str], numbers: Mapping[str, int | None]
) -> tuple[set[str], dict[str, int | None], list[str]]:
    """Separates `--flag`, and `--name N` with a whole number from 1, from the other words: (flags given, numbers by name, the rest).

    `numbers`: the names with their defaults. Raises ConfigError for an unknown name and for what is no such number.
    """
    given: set[str] = set()
    found: dict[str, int | None] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            rest.append(word)
        elif name in flags and not equals:
            given.add(name)
        elif name in numbers and name not in found:
            value = value if equals else left.pop(0) if left else ""
            if not re.fullmatch("[1-9][0-9]{0,8}", value):
                raise ConfigError(f"--{name} {value or 'without a value'} is not possible: give a whole number from 1")
            found[name] = int(value)
        else:
            known = ", ".join(f"--{n}" for n in (*numbers, *flags))
            raise ConfigError(f"{word} is {'given twice' if name in found else 'no option here'}: there are {known}")
    return given, {**numbers, **found}, rest


def only(words: Sequence[str], known: Sequence[str], decides: str) -> None:
    """Raises ConfigError for an override of another key than those known, where `decides` (the run, the encoder) decides the rest."""
    for word in words:
        if word.partition("=")[0] not in known:
            raise ConfigError(f"{word} cannot be changed here, where {decides} decides: only {', '.join(known)} can")
