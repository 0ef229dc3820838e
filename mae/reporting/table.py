"""Results as a table for the terminal: one row an encoder, one column a protocol, and a sentence where a control wins."""

from collections.abc import Mapping, Sequence
from typing import Any

from mae.reporting import measures

Entry = Mapping[str, Any]
MOST_FIGURES = 5  # of a protocol, in the terminal: all are in results.json and on the page
CONTROLS = {"control:pixels": "raw pixels", "control:pca": "PCA, same width", "control:untrained": "untrained encoder"}


def text(entries: Sequence[Entry]) -> str:
    """Entries of results.json, all of one run, as aligned text with the spread that each carries: accuracies in percent in one table, of
    every other protocol its first figures in a table of its own.
    """
    if not entries:
        return "nothing was evaluated: evaluate.protocols is empty, or its protocols need labels and a test split that the data lack"
    encoders = list(dict.fromkeys(e["encoder"]["name"] for e in entries))
    scored = {e["protocol"]: "accuracy" in e["metrics"] for e in entries}
    by_cell = {(e["encoder"]["name"], e["protocol"]): e for e in entries}
    blocks = [_figures(p, encoders, by_cell) for p, has_accuracy in scored.items() if not has_accuracy]
    protocols = [p for p, has_accuracy in scored.items() if has_accuracy]
    if protocols:
        blocks.insert(0, _accuracies(protocols, encoders, by_cell))
    first = next(e for e in entries if e["encoder"]["name"] == encoders[0])
    notes = [f"{first['data'].split('@')[0]}, {first['split']} split, n = {_count(first)}; ± {_spreads(entries)}"]
    notes += [sentence for p in protocols if (sentence := _winner(p, encoders, by_cell))]
    return "\n\n".join([*blocks, "\n".join(notes)])


def _accuracies(protocols: Sequence[str], encoders: Sequence[str], by_cell: Mapping[tuple[str, str], Entry]) -> str:
    rows = [["accuracy, %", *protocols]]
    for encoder in encoders:
        own = [by_cell.get((encoder, p)) for p in protocols]
        if any(own):
            rows.append([_label(encoder), *(_cell(e) for e in own)])
        if any(e and "accuracy_latent" in e["metrics"] for e in own):
            rows.append(["  its code", *(_cell(e, "_latent") for e in own)])
    return "\n".join(_align(rows))


def _figures(protocol: str, encoders: Sequence[str], by_cell: Mapping[tuple[str, str], Entry]) -> str:
    """A protocol without an accuracy: the first of its figures, of all encoders that have them."""
    own = {e: by_cell[e, protocol]["metrics"] for e in encoders if (e, protocol) in by_cell}
    shown = measures.figures(next(iter(own.values())))[:MOST_FIGURES]
    rows = [[protocol, *map(measures.spoken, shown)]]
    for encoder, metrics in own.items():
        cells = [measures.with_spread(m, metrics[m], _spread(metrics, m)) if m in metrics else "-" for m in shown]
        rows.append([_label(encoder), *cells])
    return "\n".join(_align(rows))


def _spread(metrics: Mapping[str, Any], metric: str) -> float | None:
    return metrics.get(f"{metric}_std", metrics.get(f"{metric}_ci95"))


def _label(encoder: str) -> str:
    return CONTROLS.get(encoder, encoder)


def _cell(entry: Entry | None, pool: str = "") -> str:
    """The accuracy of mean-pooled features, or of another pool (`_latent`), with its spread."""
    if entry is None or f"accuracy{pool}" not in entry["metrics"]:
        return "-"
    metrics = entry["metrics"]
    spread = _spread(metrics, f"accuracy{pool}")
    return f"{metrics[f'accuracy{pool}']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def _count(entry: Entry) -> str:
    return str(entry["metrics"].get("n_test", "?"))


def _spreads(entries: Sequence[Entry]) -> str:
    names = [name for e in entries for name in e["metrics"]]
    kinds = ["95% interval over test images"] if any(n.endswith("_ci95") for n in names) else []
    drawn = list(dict.fromkeys(e["protocol"] for e in entries for n in e["metrics"] if n.endswith("_std")))
    if drawn:
        kinds.append(f"standard deviation over draws ({', '.join(drawn)})")
    return ", ".join(kinds) or "not measured"


def _winner(protocol: str, encoders: Sequence[str], by_cell: Mapping[tuple[str, str], Entry]) -> str | None:
    """A sentence where a control beats the encoder. Protocols without an accuracy (a spectrum, CKA) are not won."""
    ours = by_cell.get((encoders[0], protocol))
    controls = [e for e in encoders if e.startswith("control:") and (e, protocol) in by_cell]
    if ours is None or not controls or "accuracy" not in ours["metrics"]:
        return None
    best = max(controls, key=lambda e: by_cell[e, protocol]["metrics"]["accuracy"])
    theirs = by_cell[best, protocol]["metrics"]["accuracy"]
    if theirs <= ours["metrics"]["accuracy"]:
        return None
    return f"{protocol}: {_label(best)} ahead with {theirs:.1f} against {ours['metrics']['accuracy']:.1f}."


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
