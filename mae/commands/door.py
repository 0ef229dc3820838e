"""What every command has in common: help, one-sentence errors, exit codes."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from mae import memory
from mae.errors import CannotSave, ConfigError, LossSpike, LostContact, NonFiniteLoss, Preempted, ReplicasDiffer
from mae.keys import SECTIONS, public

# Exit codes: 0 done, 2 bad configuration or input, 75 stopped by a signal after saving (EX_TEMPFAIL: run it again), 130 by Ctrl-C where
# there is nothing to save (128 + SIGINT, as shells say it), 1 else.
DONE, FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


def enter(
    story: Callable[[list[str]], None],
    usage: str,
    words: Sequence[str] | None,
    *,
    protocol: str | None = None,
    keys: Sequence[str] | Mapping[str, str] = tuple(SECTIONS),
    of_encoder: bool = False,
) -> int:
    """Runs a command's story over its words (those of the process where None) and turns its errors into a sentence and an exit code.

    `--help` shows the `keys` of these sections, or these alone, with their defaults, where a run or an encoder decides nearly all of them;
    `protocol` is the file whose keys it shows where the words name none; `of_encoder` leaves out those that an encoder decides.
    """
    as_tool = words is not None  # `mae pretrain`, not pretrain.py
    words = list(sys.argv[1:] if words is None else words)
    sys.argv[1:] = [public(word) or "" for word in sys.argv[1:]]  # W&B records them
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files may be anything
    memory.keep_freed()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s", level=logging.INFO if first else logging.ERROR, stream=sys.stderr)
    for noisy in ("timm", "httpx", "huggingface_hub", "fsspec", "PIL", "matplotlib", "torch", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if any(w in ("-h", "--help") for w in words):
        from mae.commands.help import page, spoken

        with contextlib.suppress(BrokenPipeError):  # `--help | head`
            text = spoken(usage, as_tool=as_tool)
            words = [w for w in words if not w.startswith("-")]
            print(page(text, words, protocol, keys=keys, of_encoder=of_encoder), flush=True)
        return DONE
    try:
        story(words)
        return DONE
    except ConfigError as error:
        code, message = BAD_INPUT, str(error)
    except Preempted as error:
        code, message = STOPPED, str(error)
    except (NonFiniteLoss, LossSpike, ReplicasDiffer, LostContact, CannotSave) as error:
        code, message = FAILED, str(error)
        first = first or isinstance(error, LostContact)  # who is cut off is heard by nobody else
    except KeyboardInterrupt:  # before or after training, which saves (mae.training.signals)
        code, message = INTERRUPTED, "interrupted; nothing is half written: run the same command again"
    if first:
        print(f"mae: {message}", file=sys.stderr)
    return code
