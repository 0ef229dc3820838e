"""How many images a second does a training step take, beside transformers' masked autoencoder and a textbook's?

    python benchmarks/train_step.py [--device cpu] [--models vit_tiny,vit_base] [--shards DIR] [--quick] [--save]

A step is forward pass, backward pass and update (AdamW) of the same model from the same weights, on images that lie on the device. All
sides first have to give the same loss for the same weights and the same mask. Then they take turns, so that whatever slows the machine
slows all, on a CPU in a process of each one's own; a ratio is one of each turn, and the median over turns counts. Ours is the program's
own loop with its gradient norm and its guard against bad updates, which no peer has.

    float32_ratio     ours / transformers, both in float32, each turn against the faster of its two kinds of attention
    best_ratio        ours in the precision that suits the device (bf16 where it has it) / transformers in float32
    same_ratio        the same / transformers in that precision under autocast
    textbook_ratio    the same / a textbook's step (float32 on a CPU, float16 with a loss scaler on a GPU, .item() at every step)
    compiled_ratio    the same / the textbook's with fused attention, torch.compile and fused AdamW, in our precision
    cross_ratio       ours with the cross decoder, a quarter of the hidden patches predicted / ours
    lean_ratio        ours with train.recompute=selective / ours (on a GPU)
    mfu               our FLOPs a second / those of a large matrix product in the same precision, timed in every turn
    memory_ratio      bytes an image that a step of ours needs beyond weights and moments / that the textbook's needs
    lean_memory_ratio the same of ours with train.recompute=selective
    real_ratio        ours on JPEGs from shards / ours on images that lie on the device (--shards DIR, or --shards made for generated ones)
    real_gpu_decode_ratio    the same with data.decode=gpu (on a GPU)

A step's FLOPs come from a formula and from torch's counter, which must agree within 2%. Takes about 25 minutes on 2 cores, where ViT-L is
left out; --quick, within 5 minutes, has the same keys with null for what it leaves out.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from contest import Contest
from ours import real_share
from peers import SIZES
from photos import jpeg_shards
from records import keep, names_of_machine
from sides import CLOCKS, Setting, ours_with

from mae.nets import precision as precisions
from mae.training.distributed import device_of

BATCHES = {"cpu": {"vit_tiny": 128, "vit_base": 8, "vit_large": 4}, "cuda": {"vit_tiny": 1024, "vit_base": 256, "vit_large": 128}}
KEYS = ("float32_ratio", "best_ratio", "same_ratio", "textbook_ratio", "compiled_ratio", "cross_ratio", "lean_ratio", "mfu")
KEYS += ("memory_ratio", "lean_memory_ratio", "real_ratio", "real_gpu_decode_ratio")
DECODES = {"real_ratio": "cpu", "real_gpu_decode_ratio": "gpu"}  # what data.decode=auto is chosen by


def main() -> int:
    """Prints the comparison and, last, its figures as one line of JSON."""
    options = _options()
    device = device_of(options.device)
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # as the program does
    best = precisions.choose("auto", device)
    figures: dict[str, object] = {"benchmark": "train_step", "device": device.type, "precision": best, "clock": options.clock}
    figures |= {f"{model}_{key}": None for model in SIZES for key in KEYS}
    print(f"{names_of_machine(device)}; ours in {best} and fp32", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        shards = jpeg_shards(Path(scratch), options.images) if options.shards == "made" else options.shards
        for model in options.models:
            batch = options.batch or BATCHES[device.type][model] // (2 if options.quick else 1)
            setting = Setting(SIZES[model], batch, device, best, tuple(options.precisions), options.compile, options.clock)
            contest = Contest(SIZES[model], setting, quick=options.quick)
            found = contest.run(options.repeats)
            if shards is not None:
                ours = ours_with(contest.weights, setting)
                for key, decode in DECODES.items():
                    if decode == "gpu" and device.type != "cuda":
                        continue
                    words = [f"data.workers={options.workers}", f"data.decode={decode}"]
                    found[key] = real_share(ours, setting.images(), Path(shards), words, best, options.repeats)
                    print(f"  real input, {words[1]}: {found[key]:.3f} of the rate of synthetic input", flush=True)
                del ours
            figures |= {f"{model}_{key}": value for key, value in found.items()}
            del contest
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if options.save:
        print(f"kept as {keep('train-step', device, figures)}")
    print(json.dumps(figures))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    parser.add_argument("--models", help=f"of {', '.join(SIZES)} (default: all that the device is fit for)")
    parser.add_argument("--precisions", default="float32,best", help="float32 | best | float32,best")
    parser.add_argument("--batch", type=int, help="images a step (default: by model and device)")
    parser.add_argument("--repeats", type=int, help="turns (default 7; 3 with --quick)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours under torch.compile (default: on a GPU)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the processor's time, for one thread on a busy machine")
    parser.add_argument("--shards", help="a folder of JPEG shards for real input, or `made`: generated photos")
    parser.add_argument("--images", type=int, default=512, help="how many photos `--shards made` generates")
    parser.add_argument("--workers", type=int, default=0, help="data.workers of real input")
    parser.add_argument("--quick", action="store_true", help="vit_tiny and a half batch of vit_base, few turns, no compiled peer")
    parser.add_argument("--save", action="store_true", help="keep the figures as a dated file in benchmarks/results")
    options = parser.parse_args()
    fit = [model for model in SIZES if model != "vit_large" or device_of(options.device).type == "cuda"]
    options.models = options.models.split(",") if options.models else fit
    options.precisions = options.precisions.split(",")
    options.compile = device_of(options.device).type == "cuda" if options.compile is None else options.compile
    options.repeats = options.repeats or (3 if options.quick else 7)
    if unknown := [*(set(options.models) - SIZES.keys()), *(set(options.precisions) - {"float32", "best"})]:
        parser.error(f"{', '.join(unknown)} is unknown: models are {', '.join(SIZES)}, precisions float32 and best")
    return options


if __name__ == "__main__":
    sys.exit(main())
