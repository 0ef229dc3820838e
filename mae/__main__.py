"""`python -m mae TOOL` and the console command `mae TOOL`."""

import importlib
import sys

from mae.version import __version__

TOOLS = {
    "data": "look at the images that a run would be trained on",
    "statistics": "mean and deviation of every channel, as a file that other commands take",
    "shard": "a folder of images as tar shards, checked",
    "doctor": "check whether a run could start, and predict its time, memory and cost",
    "pretrain": "pretrain an encoder without labels",
    "linear_probe": "train a linear classifier on a frozen encoder",
    "finetune": "train a classifier from an encoder, all weights",
    "evaluate": "measure any encoder by any protocols",
    "compare": "put runs side by side: a table, a spreadsheet and one page",
    "ladder": "pretrain every method on the same data and budget, and compare",
    "pictures": "draw a run: reconstructions, attention, neighbours, samples, walks, curves",
    "reconstruct": "draw what an autoencoder makes of images",
    "features": "vectors of a folder of images, by any encoder",
    "latents": "encode a folder of images as shards for latent diffusion",
    "export": "an encoder as timm, Hugging Face, the MAE authors' code, ONNX or torch alone open it",
}
FIRST = ("pretrain", "evaluate", "pictures", "features")  # each begins another step: before training, training, measuring, seeing, using


def _help() -> str:
    lines = [("\n" if name in FIRST else "") + f"  {name:<14}{doc}" for name, doc in TOOLS.items()]
    return "\n".join(
        [
            "usage: mae TOOL [WORD ...]\n",
            *lines,
            "\n`mae pretrain` without words trains on handwritten digits, in two minutes.",
            "mae TOOL --help: its words, keys, defaults and units    mae --version: for reports of faults",
        ]
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:  # a broken installation has most reason to be reported
            return f"no {package}"

    return f"mae {__version__} (Python {python_version()}, {of('torch')}, {of('timm')})"


def main() -> int:
    """Dispatches to a command's story; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(_version())
        return 0
    if words[0] not in TOOLS:
        import difflib

        near = difflib.get_close_matches(words[0], TOOLS, 1)
        print(f"mae: {words[0]} is no tool: {'did you mean ' + near[0] if near else 'choose one of ' + ', '.join(TOOLS)}?", file=sys.stderr)
        return 2
    return importlib.import_module(f"mae.commands.{words[0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
