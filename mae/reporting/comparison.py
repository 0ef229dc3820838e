"""Several runs side by side: mean and spread over seeds, and a refusal where figures were not obtained alike."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mae.errors import ConfigError
from mae.reporting.table import CONTROLS, Entry


class Row(NamedTuple):
    """One way of making features, with what its runs say."""

    name: str
    entries: list[Entry]  # of all its runs
    notes: dict[str, str]  # further columns, as text
    not_ranked: str = ""  # why it is shown but not to be compared: 'failed', 'on the plateau'
    remark: str = ""  # what else to know beside the name: '2 of 3 seeds'


def check_alike(entries: Iterable[Entry]) -> None:
    """Raises ConfigError where two entries of one protocol were made by other settings, or on other data or another split."""
    seen: dict[str, Entry] = {}
    for entry in entries:
        first = seen.setdefault(entry["protocol"], entry)
        for fact, what in (("protocol_hash", "settings"), ("data", "data"), ("split", "split")):
            if entry[fact] != first[fact]:
                unlike = f": {unlike_settings(first, entry)}" if fact == "protocol_hash" else ""
                raise ConfigError(
                    f"{entry['protocol']} was run with other {what} on {entry['encoder']['name']} ({entry[fact]}) than on "
                    f"{first['encoder']['name']} ({first[fact]}){unlike}: such figures are not put in one table; evaluate both alike"
                )


def unlike_settings(one: Entry, other: Entry) -> str:
    """The settings in which two entries of one protocol differ, `k 20 and 5, temperature 0.07 and 0.1`."""
    unlike = differences(one, other)
    if not unlike:
        return "the same settings, by another version of the evaluator"
    return ", ".join(f"{key} {first} and {second}" for key, first, second in unlike)


def differences(one: Entry, other: Entry) -> list[tuple[str, Any, Any]]:
    """(setting, its value in one, its value in the other) where two entries of one protocol were told otherwise."""
    first, second = (_flat({k: v for k, v in e.get("settings", {}).items() if not k.startswith("chosen_")}) for e in (one, other))
    keys = [k for k in dict.fromkeys([*first, *second]) if first.get(k) != second.get(k)]
    return [(k, first.get(k, "not set"), second.get(k, "not set")) for k in keys]


def columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(protocol, metric) of every accuracy at hand, the method's own code ('latent') after the encoder's features."""
    found = dict.fromkeys(
        (e["protocol"], metric) for row in rows for e in row.entries for metric in ("accuracy", "accuracy_latent") if metric in e["metrics"]
    )
    protocols = list(dict.fromkeys(protocol for protocol, _ in found))
    return sorted(found, key=lambda c: (c[1] != "accuracy", protocols.index(c[0])))


def mean_and_spread(values: Sequence[float]) -> str:
    """`97.1 ± 0.4` over two values or more, the value alone for one, a dash for none."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def markdown(rows: Sequence[Row], *, caption: str) -> str:
    """The comparison as a Markdown table: rows by the first column's mean, those not ranked last, controls below. Raises as check_alike."""
    check_alike(e for row in rows for e in row.entries)
    shown = columns(rows)
    notes = list(dict.fromkeys(name for row in rows for name in row.notes))
    heads = ["", *(p.split("/")[0].replace("_", " ") + (" of the code" if m != "accuracy" else "") for p, m in shown), *notes]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in sorted(rows, key=lambda r: (r.name in CONTROLS.values(), r.not_ranked != "", -_mean(r, shown[0]) if shown else 0)):
        cells = [mean_and_spread(_values(row, column)) for column in shown]
        aside = ", ".join(filter(None, (row.remark, row.not_ranked and f"{row.not_ranked}, not ranked")))
        name = f"{row.name} ({aside})" if aside else row.name
        lines.append(f"| {' | '.join([name, *cells, *(row.notes.get(n, '') for n in notes)])} |")
    return "\n".join([caption, "", *lines, ""])


def controls(entries: Sequence[Entry]) -> list[Row]:
    """The rows of the controls among entries of several runs, each figure once."""
    rows = []
    for name, label in CONTROLS.items():
        own = {(e["protocol"], e["data"], e["encoder"].get("hash")): e for e in entries if e["encoder"]["name"] == name}
        if own:
            rows.append(Row(label, list(own.values()), {}))
    return rows


def _values(row: Row, column: tuple[str, str]) -> list[float]:
    protocol, metric = column
    return [e["metrics"][metric] for e in row.entries if e["protocol"] == protocol and metric in e["metrics"]]


def _mean(row: Row, column: tuple[str, str]) -> float:
    values = _values(row, column)
    return statistics.mean(values) if values else float("-inf")


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
