"""The errors that are answered with one sentence and an exit code instead of a traceback."""


class ConfigError(Exception):
    """Bad configuration or input; the message is one sentence that names the way out. Commands exit with code 2."""


class NonFiniteLoss(Exception):
    """The loss or the gradient stopped being finite; weights and moments are those of the last good step."""


class Preempted(Exception):
    """A signal asked the run to stop; a checkpoint was saved. Commands exit with code 75."""
