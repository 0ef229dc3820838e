"""The story of the ladder: every method on the same encoder, data and budget, measured alike, in one table."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae import config, memory
from mae.commands import compare, door, pretrain
from mae.config import Config
from mae.data.sources import open_splits
from mae.errors import ConfigError, Preempted
from mae.reporting import comparison
from mae.reporting.comparison import Row
from mae.training.run import RunFolder
from mae.training.schedule import plan

USAGE = """
usage: mae ladder configs/data/digits.yaml [--quick] [section.key=value ...]

Pretrains every method of configs/methods on the same data with the same encoder, settings and seeds 0, 1, 2: once for equally many images
(equal epochs), once for as many training FLOPs as the MAE takes. Evaluates all alike and writes comparison-BUDGET.md,
anew after every seed, and report-BUDGET/, a page to read. Again: goes on where it stopped.

  --quick   seed 0 and equal FLOPs only
"""
SEEDS, BUDGETS = (0, 1, 2), ("flops", "epochs")
REFERENCE = "mae"  # whose length and FLOPs are the budget


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words)


def _story(words: list[str]) -> None:
    quick = "--quick" in words
    words = [w for w in words if w != "--quick"]
    if not any(w.endswith(".yaml") for w in words):
        raise ConfigError("on which data? Give a file such as configs/data/digits.yaml")
    if any(w.startswith(("method.", "train.seed=", "run.dir=")) for w in words):
        raise ConfigError("the ladder sets method, train.seed and run.dir itself: leave them out")
    methods = sorted(p.stem for p in (config.configs_folder() / "methods").glob("*.yaml"))
    configs = {name: config.load([*words, f"configs/methods/{name}.yaml"]) for name in methods}
    base = configs[REFERENCE]
    if not base.evaluate.protocols:
        raise ConfigError("evaluate.protocols is empty, and there would be nothing to compare: name some files of configs/evaluation")
    steps = plan(base, len(open_splits(base.data).train)).steps
    if steps is None:
        raise ConfigError("the ladder counts steps, not minutes: give train.epochs or train.steps")
    folder = Path("runs") / f"ladder-{base.data.name}{'-quick' if quick else ''}"

    costs = {name: _cost(cfg) for name, cfg in configs.items()}
    for budget in BUDGETS[:1] if quick else BUDGETS:
        equal = budget == "epochs"
        lengths = {n: steps if equal or not cost else max(round(steps * costs[REFERENCE] / cost), 1) for n, cost in costs.items()}
        seeds = SEEDS[:1] if quick else SEEDS
        for count, seed in enumerate(seeds, 1):  # a table of one seed is there long before that of all
            for name, length in lengths.items():
                run = folder / budget / f"{name}-s{seed}"
                _train(run, [*words, f"configs/methods/{name}.yaml", f"train.steps={length}", f"train.seed={seed}"])
            runs = {name: [RunFolder(folder / budget / f"{name}-s{s}") for s in seeds[:count]] for name in methods}
            _write(folder / f"comparison-{budget}.md", budget, runs, lengths, costs, base)
        done = [run.path for some in runs.values() for run in some if run.state() == "done"]
        if done:
            records = [compare.read(run, finished=True) for run in done]
            print("\n".join(map(str, compare.write(records, folder / f"report-{budget}", separate=False))))


def _cost(cfg: Config) -> float:
    """Training FLOPs an image; 0 for a method that no gradient trains."""
    import torch

    from mae.methods.build import build
    from mae.training import flops

    torch.manual_seed(0)
    method = build(cfg)
    return flops.per_image(method, lambda m, x, keys: m(x, keys=keys), (cfg.data.channels, *cfg.image_size)) if method.learns else 0.0


def _train(run: Path, words: list[str]) -> None:
    """One run, unless it is done. A failure is noted in its status.json and leaves a gap in the table; a signal stops the ladder."""
    if RunFolder(run).state() == "done":
        return
    print(f"\n=== {run}", flush=True)
    code = pretrain.main([*words, f"run.dir={run}"])
    gc.collect()
    memory.give_back()  # what its evaluation took at its peak would stay for all runs after it
    if code == door.STOPPED:
        raise Preempted("the ladder is stopped, its runs are saved: run the same command to go on")
    if code == door.BAD_INPUT:
        raise ConfigError(f"{run} cannot be trained, the sentence above says why; mend that and run the same command to go on")


def _write(
    file: Path, budget: str, runs: dict[str, list[RunFolder]], lengths: dict[str, int], costs: dict[str, float], base: Config
) -> None:
    rows, everything = [], []
    for name, some in runs.items():
        done = [run for run in some if run.state() == "done"]
        entries = [e for run in done for e in json.loads(run.results.read_text())]
        everything += entries
        figures = [_held_out(run) for run in done]
        images = lengths[name] * base.train.batch_size if costs[name] else 0
        notes = {
            "explained variance, %": comparison.mean_and_spread(
                [100 * f["explained_variance_target"] for f in figures if f.get("loss") is not None]
            ),
            "images": f"{images:,}" if images else "-",
            "training TFLOP": f"{costs[name] * images / 1e12:.3g}" if images else "-",
        }
        stuck = any(f.get("loss", 0) > f.get("baseline/mean_image", float("inf")) * 0.95 for f in figures)
        own = [e for e in entries if not e["encoder"]["name"].startswith("control:")]
        not_ranked = "failed" if not done else "on the plateau" if stuck else ""
        remark = f"{len(done)} of {len(some)} seeds" if 0 < len(done) < len(some) else ""
        rows.append(Row(name, own, notes, not_ranked, remark))
    rows += comparison.controls(everything)
    count = max(map(len, runs.values()))
    seeds = "one seed" if count == 1 else f"{count} seeds, mean ± standard deviation over them"
    n = next((e["metrics"].get("n_test") for e in everything), "?")
    equal = "as many training FLOPs as the MAE (forward and backward passes; what the optimizer does is not counted)"
    what = equal if budget == "flops" else "equally many images"
    caption = f"{base.data.name}, {what}, {seeds}; accuracy in %, test split, n = {n}; settings as for the MAE, not tuned for each method"
    text = comparison.markdown(rows, caption=caption)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"\n{text}\n{file}")


def _held_out(run: RunFolder) -> dict[str, Any]:
    """The last held-out figures of a run, their prefix removed."""
    rows = [row for row in run.rows() if any(k.startswith("held_out/") for k in row)]
    return {k.removeprefix("held_out/"): v for k, v in (rows[-1] if rows else {}).items()}
