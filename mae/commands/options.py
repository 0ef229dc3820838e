"""The few `--name value` pairs that commands take besides their words."""

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from mae.errors import ConfigError


def take(words: Sequence[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Separates `--name value` and `--name=value` from the other words: (values by name, the rest).

    Every name has to be given, once. Raises ConfigError for a missing or unknown one.
    """
    _, found, rest = _separate(words, (), names)
    for name in names:
        if not found.get(name):
            raise ConfigError(f"--{name} is missing: say it with --{name} {name.upper()}")
    return found, rest


def pick(
    words: Sequence[str], flags: Sequence[str] = (), numbers: Mapping[str, int | None] = MappingProxyType({}), texts: Sequence[str] = ()
) -> tuple[set[str], dict[str, int | None], dict[str, str], list[str]]:
    """Separates what may be given, `--flag`, `--name N` with a whole number from 1, `--name TEXT`, from the other words.

    `numbers`: the names with their defaults. Returns the flags that are given, the numbers by name, the texts that are given by name, and
    the rest. Raises ConfigError for an unknown name and for what is no such number.
    """
    given, found, rest = _separate(words, flags, (*numbers, *texts))
    for name, value in found.items():
        if not value or (name in numbers and not re.fullmatch("[1-9][0-9]{0,8}", value)):
            wanted = "a whole number from 1" if name in numbers else "a value"
            raise ConfigError(f"--{name} {value or 'without a value'} is not possible: give {wanted}")
    read = {name: int(found[name]) if name in found else default for name, default in numbers.items()}
    return given, read, {name: found[name] for name in texts if name in found}, rest


def _separate(words: Sequence[str], flags: Sequence[str], names: Sequence[str]) -> tuple[set[str], dict[str, str], list[str]]:
    """(flags given, values by name, the rest); a value that is missing is empty."""
    given: set[str] = set()
    found: dict[str, str] = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            rest.append(word)
        elif name in flags and not equals:
            given.add(name)
        elif name in names and name not in found:
            found[name] = value if equals else left.pop(0) if left else ""
        else:
            known = ", ".join(f"--{n}" for n in (*names, *flags))
            raise ConfigError(f"{word} is {'given twice' if name in found else 'no option here'}: there are {known}")
    return given, found, rest


def only(words: Sequence[str], known: Collection[str], decides: str) -> None:
    """Raises ConfigError for an override of another key than those known, where `decides` (the run, the encoder) decides the rest."""
    for word in words:
        if word.partition("=")[0] not in known:
            raise ConfigError(f"{word} cannot be changed here, where {decides} decides: only {', '.join(known)} can")
