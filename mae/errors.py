"""The errors that are answered with one sentence and an exit code instead of a traceback."""


class ConfigError(Exception):
    """Bad configuration or input; the message is one sentence that names the way out. Commands exit with code 2."""


class NonFiniteLoss(Exception):
    """The loss or the gradient stopped being finite; weights and moments are those of the last good step."""


class LossSpike(Exception):
    """The loss leapt and stayed up. Going back to `calm_until` steps or before and leaving the data since then out may help."""

    def __init__(self, message: str, *, calm_until: int) -> None:
        super().__init__(message)
        self.calm_until = calm_until


class ReplicasDiffer(Exception):
    """Ranks that should hold the same weights do not."""


class LostContact(Exception):
    """Another rank died or does not answer. Commands exit with code 1, every rank with its own sentence."""


class CannotSave(Exception):
    """A checkpoint could not be written, the ones before it are as they were. Commands exit with code 1."""


class Preempted(Exception):
    """A signal asked the run to stop; a checkpoint was saved. Commands exit with code 75."""
