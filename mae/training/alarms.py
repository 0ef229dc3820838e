"""What somebody should look at while a run goes on, said once a cause: in the log, in metrics.jsonl and as a W&B alert.

What each means and what to do stands in docs/troubleshooting.md.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mae.training.run import RunFolder
from mae.training.tracking import Tracker
from mae.training.watch import SPIKE

log = logging.getLogger("mae")

WAIT, LONG_SECONDS = 0.2, 60.0  # share of the time spent waiting for data, and how long that may last


class Alarms:
    """Looks at the rows of metrics.jsonl as they come; what the folder's rows have told is not told again."""

    def __init__(self, folder: RunFolder, tracker: Tracker, seconds: float, *, goes_back: bool) -> None:
        """`goes_back`: a loss spike is answered, and told, by who goes back."""
        self.folder, self.tracker, self.goes_back = folder, tracker, goes_back
        self.told = {row["alarm"] for row in folder.rows() if "alarm" in row}
        self.seconds, self.waiting = seconds, 0.0  # of training so far; of those with too much waiting, up to now

    def look(self, row: Mapping[str, Any], seconds: float) -> None:
        """At a row that was logged after so many seconds of training."""
        step = row["step"]
        self.waiting = self.waiting + seconds - self.seconds if row["data_wait"] > WAIT else 0.0
        self.seconds = seconds
        if row["skipped_updates"]:
            self.say(
                "skipped updates",
                f"by step {step} a loss or gradient was not finite and {row['skipped_updates']} updates were skipped",
                step,
            )
        if row["loss_excess"] > SPIKE and not self.goes_back:
            self.say("loss spike", f"the loss leapt and is {row['loss']:.4g} at step {step}; train.spike={SPIKE:g} would go back", step)
        if self.waiting > LONG_SECONDS:
            self.say(
                "data wait", f"{row['data_wait']:.0%} of the time goes into waiting for images (step {step}): raise data.workers", step
            )
        if row["replaced"]:
            self.say("damaged images", f"by step {step} {row['replaced']} damaged images were replaced by others", step)

    def say(self, cause: str, sentence: str, step: int) -> None:
        """Unless this cause was told before."""
        if cause not in self.told:
            self.told.add(cause)
            self.tell(cause, sentence, step)

    def tell(self, cause: str, sentence: str, step: int) -> None:
        """In any case."""
        log.warning("ALARM (%s): %s (docs/troubleshooting.md)", cause, sentence)
        self.folder.append({"step": step, "alarm": cause, "sentence": sentence})
        self.tracker.alert(cause, sentence)


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The alarms among the rows of metrics.jsonl, in sentences, each once."""
    return list(dict.fromkeys(f"ALARM ({row['alarm']}): {row['sentence']}" for row in rows if "alarm" in row))
