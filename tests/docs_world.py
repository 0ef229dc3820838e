"""A small world in which the commands of the docs run: folders by the names that the pages use, tiny models, short protocols."""

import contextlib
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import webdataset
from docs_pages import ROOT
from PIL import Image

CHANNELS = 13  # of the arrays
CLASSES = ("cat", "dog", "owl")
SYNSETS = ("n01532829", "n02123159", "n02606052", "n02676566", "n02747177", "n03014705", "n10148035")  # photos are named after theirs
NO_WORKERS = "data.workers=0"  # on a busy machine each takes longer to start than all that it would do here
TRAINING = {"pretrain", "doctor", "data"}
SHORT = ["train.precision=fp32", "train.log_every=1", "train.batch_size=8", "optim.warmup_epochs=0", "track.wandb=off", NO_WORKERS]
SMALL = ["encoder.embed_dim=48", "encoder.depth=2", "train.steps=4", *SHORT]  # 48: every head count of timm's ViTs divides it
# what stands for a file or a name that would have to be downloaded
ELSEWHERE = {
    "timm:vit_base_patch16_224.mae": "encoder",
    "hf:facebook/vit-mae-base": "hf:hf",
    "mae_pretrain_vit_base.pth": "official/full.pth",
}
# numbers of protocols that decide how long they take
SHORTER = {"epochs": 2, "prior_steps": 4, "classifier_steps": 4, "images": 60, "code_images": 60, "iwae_images": 8, "iwae_samples": 4}
SHORTER |= {"votes": 200, "trees": 2, "train_images": 40, "test_images": 40, "draws": 2, "mapped": 50, "bank_patches": 200, "rounds": 2}


class World:
    """The data once, a working folder a page; runs that a command needs and the page did not make are trained when they are asked for."""

    def __init__(self, home):
        self.home = home
        home.mkdir()
        _photos(home / "DIR")
        for name in ("my_images", "labelled"):
            (home / name).symlink_to("DIR")
        (home / "photos").mkdir()
        for i, file in enumerate(sorted((home / "DIR").rglob("*.jpg"))):
            shutil.copy(file, home / "photos" / f"{SYNSETS[i % len(SYNSETS)]}_{i}.JPEG")
        for split in ("train", "val"):
            _photos(home / "data" / "imagenet" / split)
        _arrays(home / "scans")
        _parts(home / "parts")
        _cifar(home / "cifar10")
        files = [f"DIR/{p.relative_to(home / 'DIR')}" for p in sorted((home / "DIR").rglob("*.jpg"))]
        (home / "list.txt").write_text("\n".join(files))
        _protocols(home / "configs" / "evaluation")

    def page(self, folder):
        """A working folder for a page's commands."""
        folder.mkdir()
        for entry in self.home.iterdir():
            if entry.name != "runs":
                (folder / entry.name).symlink_to(entry)
        return folder

    def prepare(self, words):
        """Brings the runs and encoders that the words name into this folder, unless they are there."""
        text = " ".join(words)
        if any(word.split("=")[-1] in ELSEWHERE.values() for word in words):
            self._encoders()
        for name in re.findall(r"(?:^|[= \":])runs/([\w-]+)(?=$|[ /\";])", text):
            if not Path("runs", name).exists() and re.fullmatch(r"(digits|shapes|folder|in1k)-[\w-]+", name):
                with contextlib.chdir(self.home):
                    self._run(name)
                shutil.copytree(self.home / "runs" / name, Path("runs") / name, symlinks=True)

    def shell(self, line):
        """A line of the shell, in this folder alone: a folder that it makes is not the world's."""
        for top in {Path(word).parts[0] for word in line.split()[1:] if line.startswith("mkdir ")}:
            if Path(top).is_symlink():
                Path(top).unlink()
        self.prepare([line])
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), line

    def execute(self, block):
        """A block of Python, which needs nothing but what it imports and what lies here."""
        text = elsewhere(block).replace("224, 224", "112, 112")
        self.prepare(re.findall(r'"([^"\n]*)"', text))
        exec(compile(text, "<docs>", "exec"), {"__name__": "docs"})

    def _encoders(self):
        """What stands for encoders from elsewhere."""
        with contextlib.chdir(self.home):
            self._run("folder-mae")
            if not Path("encoder").exists():
                shutil.copytree("runs/folder-mae/encoder", "encoder")
                for layout in ("hf", "official"):
                    run("export", ["runs/folder-mae", "--format", layout, "--out", layout])
        for name in ("encoder", "hf", "official"):
            if not Path(name).exists():
                Path(name).symlink_to(self.home / name)

    def _run(self, name):
        if not Path("runs", name).exists():
            data, method = name.split("-")[:2]
            words = [f"configs/data/{'folder' if data == 'in1k' else data}.yaml", f"configs/methods/{method}.yaml"]
            words += ["data.path=DIR"] if data in ("folder", "in1k") else []
            run("pretrain", small("pretrain", [*words, f"run.dir=runs/{name}"]))


def elsewhere(text):
    """The text with what stands here for encoders from elsewhere."""
    for name, here in ELSEWHERE.items():
        text = text.replace(name, here)
    return text


def small(story, words):
    """A command's words in this world: the same names, less work."""
    words = [elsewhere(w.replace("=/", "=").replace(" /", " ")) for w in words]
    text = " ".join(words)
    if "cifar10" in text:
        words = [w.replace("data.path=DIR", "data.path=cifar10") for w in words]
    if "--ranks" in words:
        return words  # on paper
    if story in TRAINING:
        shape = [w for w in SMALL if not w.startswith("encoder.") or "encoder.from=" not in text]
        if re.search(r"(data/folder|shards|imagenet|in1k)\S*\.yaml", text) and "image_size" not in text:
            shape.append("data.image_size=112")  # 7 x 16 and 8 x 14
        if "_in1k" in text:
            shape += ["method.decoder_depth=1", "method.decoder_width=32", "method.decoder_heads=1"]
        if "shapes.yaml" in text:
            shape.append("data.length=400")
        if not re.search(r"evaluate\.|stream", text):
            shape += ["evaluate.protocols=[knn]", "evaluate.controls=false"]
        return [*words, *shape]
    if story in ("finetune", "linear_probe") or "finetune_" in text or "probe_paper" in text:
        return [*words, "train.epochs=1", *SHORT] if "quick" not in text and (story == "finetune" or "yaml" in text) else words
    return [*words, NO_WORKERS] if story in ("evaluate", "linear_probe", "features", "latents", "statistics") else words


def run(story, words):
    """A command in this process; its exit code."""
    return importlib.import_module(f"mae.commands.{story}").main(list(words))


def _photos(folder, count=16):
    """Class folders of JPEG files of unlike sizes: stripes of a colour that the class decides, under noise."""
    draw = np.random.default_rng(len(folder.parts) + len(folder.name))
    for i, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            height, width = draw.integers(60, 100, 2)
            pixels = draw.integers(0, 90, (height, width, 3)) + (np.arange(width) // 8 % 2 * 120)[:, None]
            pixels[..., i] += 40
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{j}.jpg")


def _arrays(folder, count=20):
    """16-bit arrays of many channels, no squares."""
    draw = np.random.default_rng(0)
    for i, name in enumerate(("field", "wood")):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            np.save(folder / name / f"{j}.npy", draw.integers(0, 20000 * (i + 1), (72, 104, CHANNELS), dtype=np.uint16))


def _parts(folder):
    """Good and defective parts as MVTec AD lays them out, with masks."""
    draw = np.random.default_rng(1)
    for place, count in (("train/good", 32), ("test/good", 8), ("test/scratch", 8)):
        (folder / place).mkdir(parents=True)
        for j in range(count):
            pixels, mask = draw.integers(90, 120, (96, 96, 3), dtype=np.uint8), np.zeros((96, 96), np.uint8)
            if "scratch" in place:
                pixels[40:44, 10:80] = 250
                mask[40:44, 10:80] = 255
                (folder / "ground_truth" / "scratch").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(folder / "ground_truth" / "scratch" / f"{j:03}_mask.png")
            Image.fromarray(pixels).save(folder / place / f"{j:03}.png")


def _cifar(folder):
    """Tar shards as CIFAR-10 may lie in a folder."""
    draw = np.random.default_rng(2)
    folder.mkdir()
    for split, count in (("train", 100), ("test", 40)):
        with webdataset.TarWriter(str(folder / f"cifar10-{split}-0000.tar")) as shard:
            for i in range(count):
                shard.write({"__key__": f"{i:06}", "jpg": draw.integers(0, 256, (32, 32, 3), dtype=np.uint8), "cls": i % 10})


def _protocols(folder):
    folder.mkdir(parents=True)
    for file in (ROOT / "configs" / "evaluation").glob("*.yaml"):
        number = lambda m: f"{m[1]}: {min(SHORTER[m[1]], int(m[2]))}" if m[1] in SHORTER else m[0]  # noqa: E731
        (folder / file.name).write_text(re.sub(r"\b(\w+): (\d+)\b", number, file.read_text()))
