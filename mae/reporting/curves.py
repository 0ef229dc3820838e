"""How a run went, as a picture: its loss, what it explains of held-out images, and its probes while it trained."""

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("#1f5fbf", "#c8571b", "#2e7d4f", "#7a5195")
# panel -> (axis, {key of metrics.jsonl: name})
PANELS = {
    "Loss": ("", {"loss": "training"}),
    "Explained variance of held-out images": (
        "%",
        {"held_out/explained_variance": "pixels", "held_out/explained_variance_target": "target"},
    ),
    "Probes on held-out images": ("accuracy, %", {"knn/accuracy": "20-NN", "linear_probe/accuracy": "linear probe"}),
    "Learning rate": ("", {"lr": "learning rate"}),
}


def figure(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """A matplotlib Figure of the rows of metrics.jsonl of the run `name`, a panel a subject; None where nothing was logged twice."""
    from matplotlib.figure import Figure

    panels = {title: (axis, {key: found for key in keys if len(found := _points(rows, key)) > 1}) for title, (axis, keys) in PANELS.items()}
    panels = {title: (axis, _unlike(lines)) for title, (axis, lines) in panels.items() if lines}
    if not panels:
        return None
    drawn = Figure(figsize=(3.6 * len(panels), 2.7), layout="constrained", dpi=150)
    for axes, (title, (unit, lines)) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        scale = 100 if unit == "%" else 1
        for colour, (key, points) in zip(COLOURS, lines.items(), strict=False):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, [scale * v for v in values], color=colour, linewidth=1.4, label=PANELS[title][1][key])
        every = [v for points in lines.values() for _, v in points]
        if title == "Loss" and min(every) > 0 and max(every) / min(every) > 20:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.grid(color="#e4e0d8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    drawn.suptitle(name, fontsize=10)
    return drawn


def _unlike(lines: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Without the lines that would lie on another one."""
    kept: dict[str, list[tuple[int, float]]] = {}
    for key, points in lines.items():
        if points not in kept.values():
            kept[key] = points
    return kept


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    if key.startswith("held_out/"):  # those of the end are of other, more images
        rows = [row for row in rows if "held_out/images" in row]
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float) and "step" in row]
