"""What the first rank shows while it trains: a progress bar on a terminal, a line now and then in a log file."""

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

from mae.training.schedule import Plan
from mae.units import clock


class Console:
    """Shows the rows of metrics.jsonl as they come. Silent on the other ranks."""

    def __init__(self, plan: Plan, step: int, seconds: float, *, first: bool) -> None:
        self.plan, self.first, self.last_line = plan, first, 0.0
        self.terminal = first and sys.stderr.isatty()
        self.bar = None
        if self.terminal:
            total = plan.steps if plan.steps is not None else round(plan.seconds or 0)
            unit = "steps" if plan.steps is not None else "s"
            start = step if plan.steps is not None else round(seconds)
            shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"
            # the smallest delay: it is drawn with the first row and not before, when W&B still writes its own first lines
            self.bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True, bar_format=shown, delay=1e-9)

    def row(self, row: dict[str, Any], seconds: float) -> None:
        """Shows a row; `seconds` of training are over."""
        if self.first:
            with contextlib.suppress(OSError):  # a terminal that was closed, or a pipe's reader that has gone, ends no training
                self._show(row, seconds)

    def _show(self, row: dict[str, Any], seconds: float) -> None:
        figures = f"loss {row['loss']:.4f}, lr {row['lr']:.2e}, {row['images_per_second']:.0f} images/s"
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update((row["step"] if self.plan.steps is not None else round(seconds)) - self.bar.n)
        elif time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            done = self.plan.done(row["step"], seconds)
            left = seconds * (1 - done) / done if done else 0.0
            print(f"step {row['step']} ({done:.0%}): {figures}, {clock(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
