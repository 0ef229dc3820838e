"""Results as dated files: figures with the hardware, the versions and the command that gave them."""

import datetime
import importlib.metadata
import itertools
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def names_of_machine(device: torch.device) -> str:
    """The processor that computes, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.partition("\n\n")[0].splitlines())}
    model = f"{told['model name']} (family {told.get('cpu family')})" if "model name" in told else platform.processor()
    units = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in info]
    return f"{model}, {torch.get_num_threads()} threads, {' '.join(units) or 'no AVX-512'}"


def versions() -> dict[str, str]:
    """Those of Python and of the libraries that matter here."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The version of this project's code, with a + where files were changed since."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=RESULTS, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def keep(name: str, device: torch.device, figures: dict[str, object]) -> Path:
    """Writes benchmarks/results/DATE-NAME-DEVICE.json, or with a number where that is there; returns its path."""
    today = datetime.date.today().isoformat()
    names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    file = next(f for more in names if not (f := RESULTS / f"{today}-{name}-{device.type}{more}.json").exists())
    record = {
        "command": "python " + shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": today,
        "code": commit(),
        "hardware": names_of_machine(device),
        "versions": versions(),
        "figures": figures,
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
