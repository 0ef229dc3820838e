"""Bad words are answered with one sentence and exit code 2, quickly, and nothing is made."""

import contextlib
import importlib
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml

from mae import config
from mae.__main__ import TOOLS
from mae.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_files_and_words_merge_left_to_right_and_the_last_duration_counts(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: configs/data/digits.yaml\ntrain: {epochs: 3}\noptim: {base_lr: 0.5}\n")
    merged = config.load([str(file), "optim.base_lr=0.25", "method.mask_ratio=0.5"])
    assert (merged.train.epochs, merged.train.steps, merged.optim.base_lr, merged.data.name) == (3, None, 0.25, "digits")
    assert config.load([str(file), "train.minutes=2"]).train.epochs is None


def test_a_resolved_configuration_reads_back_as_itself():
    once = config.load(["train.seed=3", "encoder.reg_tokens=2"])
    assert config.load([], base=once.as_dict()) == once


def test_choosing_another_data_or_method_replaces_the_whole_section():
    other = config.load(["configs/data/folder.yaml", "data.path=here"])
    assert (other.data.channels, other.data.cache, other.encoder.patch_size) == (3, "none", None)


def test_a_text_is_what_was_written(tmp_path):
    for written in ("on", "no", "true", "1e3", "007", "plain"):
        assert config.load([f"run.dir={written}"]).run.dir == written
    assert config.load(["run.dir=null"]).run.dir is None
    assert config.load(["track.wandb=off"]).track.wandb == "off"
    file = tmp_path / "mine.yaml"
    for text in ("run: {dir: on}", "track: {tags: [big, no]}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="put it between quotes"):
            config.load([str(file)])
    file.write_text("run: {dir: 'on'}\ntrack: {wandb: off}")
    assert (config.load([str(file)]).run.dir, config.load([str(file)]).track.wandb) == ("on", "off")


BAD = {
    "method.mask_ratoi=.5": "did you mean method.mask_ratio?",
    "runs/x": "write section.key=value",
    "mask_ratio=.5": "did you mean method.mask_ratio?",
    "trian.steps=3": "did you mean train?",
    "train.epochs=ten": "train.epochs=ten is no number: the default is null",
    "train.batch_size=abc": "train.batch_size=abc is no whole number: the default is 256",
    "train.batch_size=2.5": "no whole number",
    "train.compile=maybe": "train.compile=maybe is neither true nor false: the default is false",
    "optim.betas=0.9": "optim.betas=0.9 is no list of numbers: the default is [0.9,0.95]",
    "data.mean=[a]": "data.mean=[a] is no list of numbers",
    "encoder.depth=four": "encoder.depth=four is no whole number: the default is null",
    "run.dir=${HOME}": "Interpolation",
    "train.precision=bf17": "did you mean bf16?",
    "method.mask_ratio=high": "method.mask_ratio=high is no number: the default is 0.75",
    "method.decoder_depth=two": "method.decoder_depth=two is neither auto nor a number: the default is auto",
    "method.norm_pix=1": "choose one of auto, true, false",
    "protocol.name=knn protocol.train_first=some": "protocol.train_first=some is no whole number: the default is null",
    "protocol.name=linear_probe_quick protocol.held_out=true": "protocol.held_out=true is no number",
    "method.mask_ratio=0.99": "hides all of the 16 patches",
    "method.mask_ratio=0": "hides none of the 16 patches",
    "encoder.patch_size=8": "a single patch has nothing to hide",
    "method.masking=blok": "did you mean block?",
    "data.image_size=9": "try 8",
    "data.path=photos": "say configs/data/folder.yaml too",
    "data.mean=[0,0]": "give one a channel",
    "train.accumulate=3": "train.batch_size 256 is not a multiple of ranks x accumulate = 1 x 3: try 255",
    "train.batch_size=0": "above zero",
    "configs/data/digit.yaml": "did you mean configs/data/digits.yaml?",
    "method.name=mea": "did you mean mae?",
    "evaluate.protocols=[knnn]": "did you mean",
}


@pytest.mark.parametrize("word", BAD)
def test_a_bad_word_is_answered_with_the_way_out(word):
    with pytest.raises(ConfigError) as caught:
        config.load(word.split())
    assert BAD[word] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("vae method.beta=-1", "method.beta -1 must be at least 0: the default is 1.0"),
        ("beta_vae method.beta=.nan", "must be at least 0: the default is 4.0"),
        ("vq_vae method.codebook_size=1", "method.codebook_size 1 must be at least 2: the default is auto"),
        ("vq_vae method.decay=1", "must be at least 0 and below 1: the default is 0.99"),
        ("vq_vae method.levels=[5,1]", "method.levels 1 must be at least 2: the default is [8,5,5,5]"),
        ("ae method.bottleneck_size=64", "an image has 64 values and the encoder is 64 wide: choose one from 1 to 63"),
        ("ae method.bottleneck=token method.bottleneck_size=4", "a patch has 4 values and the encoder is 64 wide: choose one from 1 to 3"),
        ("ae encoder.embed_dim=null method.bottleneck_size=64", "an image has 64 values: choose one from 1 to 63"),
        ("ae method.loss=bce", "set mean to 0 and std to 1"),
    ],
)
def test_a_methods_limits_are_known_from_the_words_alone(words, sentence):
    """Their file's lines of help begin with them; nothing is made, nor torch imported, to find out."""
    method, *rest = words.split()
    with pytest.raises(ConfigError) as caught:
        config.load([f"configs/methods/{method}.yaml", *rest])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("method", "word", "value"),
    [("vae", "method.beta=0", 0), ("vq_vae", "method.codebook_size=2", 2), ("ae encoder.name=linear", "method.bottleneck=token", "token")],
)
def test_what_is_just_allowed_is_allowed(method, word, value):
    name, *rest = method.split()
    loaded = config.load([f"configs/methods/{name}.yaml", *rest, word])
    assert loaded.method[word.split("=")[0].removeprefix("method.")] == value


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="longer than the run of 3"):
        config.load(["train.epochs=3", "optim.warmup_epochs=5"])


def timed(*command, cwd=None):
    """The finished command and its seconds of the processor: others may use the machine too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def heavy_imports():
    """The seconds that torch and timm take here."""
    return timed("-c", "import torch, timm")[1]


def run(*words, cwd):
    done, seconds = timed("-X", "importtime", ROOT / "pretrain.py", *words, cwd=cwd)
    imports, said = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else said).append(line)
    return done, "".join(said), {line.rpartition("|")[2].strip() for line in imports}, seconds


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method.mask_ratoi=.5"], "did you mean"),
        (["configs/data/folder.yaml", "data.path=nowhere"], "nowhere"),
        (["configs/data/folder.yaml", "data.path=empty"], "empty"),
        (["train.steps=10", "optim.warmup_epochs=9"], "longer than the run"),
        (["encoder.name=vit_tinny_patch16_224"], "did you mean vit_tiny_patch16_224?"),
        (["encoder.from=timm:vit_bas_patch16_224"], "did you mean timm:vit_base_patch16_224?"),
        (["encoder.from=empty"], "neither a run folder nor a model's"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_the_command_exits_with_2_in_one_sentence_and_leaves_nothing(words, sentence, heavy_imports, tmp_path):
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done, said, imported, seconds = run(*words, cwd=tmp_path)
    assert done.returncode == 2, said
    assert said.startswith("mae: ")
    assert said.count("\n") == 1
    assert sentence in said
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert "mae.config" in imported
    assert imported.isdisjoint({"torch", "timm", "sklearn"})  # whose seconds nobody waits for to read of a wrong word
    assert seconds < heavy_imports / 2


def test_ctrl_c_where_nothing_is_to_be_saved_is_answered_in_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/list.txt"
        words = ["data", "configs/data/shards.yaml", f"data.path={url}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
        process = subprocess.Popen([sys.executable, "-m", "mae", *words], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        with silent.accept()[0]:  # it asks, and waits for an answer
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, "mae: interrupted; nothing is half written: run the same command again\n")


def test_help_needs_no_torch_and_lists_every_key(tmp_path):
    probe = "import sys; from mae.commands.pretrain import main; code = main(['--help']); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in config.all_keys({"method": {"name": "mae"}}):
        assert name.endswith(".name") or f"{name}=" in done.stdout
    assert re.search(r"method.norm_pix=auto +choice +auto \| true \| false: ", done.stdout)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_says_type_default_and_meaning_of_every_key_and_option_that_a_tool_takes(tool, capsys):
    module = importlib.import_module(f"mae.commands.{tool}")
    assert module.main(["--help"]) == 0
    text = capsys.readouterr().out
    shown = re.findall(
        r"^  (\w+\.\w+)=(\S+) +(?:choice|integer|number|boolean|text|\[(?:integer|number|text)\]) +\S.{4}", text, re.MULTILINE
    )
    keys = [name for name, _ in shown]
    assert len(keys) == len(set(keys)) == len(re.findall(r"^  \w+\.\w+=", text, re.MULTILINE))
    assert set(keys) >= set(getattr(module, "WORDS", ()))
    assert bool(keys) is (tool != "export")
    options = set(re.findall(r"--[a-z][\w-]*", text.split("\n\n")[0])) - {"--nproc-per-node"}
    for option in options:
        assert re.search(rf"^  (--\w+, )*{option}\b", text, re.MULTILINE), option


@pytest.mark.parametrize("tool", ["features", "shard", "pretrain"])
def test_help_fills_a_terminal_and_is_plain_in_a_file(tool):
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 80))
    command = [sys.executable, "-m", "mae", tool, "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=inside, env={**os.environ, "TERM": "xterm", "COLUMNS": ""}):
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):  # the end
            while part := os.read(terminal, 65536):
                shown += part
    os.close(terminal)
    plain = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = shown.decode().replace("\r\n", "\n")
    assert ("\033[1m" in text) is (tool != "features")  # headings of sections
    assert "\033" not in plain
    text = re.sub(r"\033\[\d*m", "", text)
    assert text.split() == plain.split()
    assert max(map(len, text.splitlines())) <= 80 or tool == "pretrain"  # whose default of evaluate.protocols alone is wider


def test_every_shipped_file_is_valid():
    files = [f for f in sorted((ROOT / "configs").rglob("*.yaml")) if "sweeps" not in f.parts]
    assert len(files) >= 10
    for file in files:
        found = config.load([str(file)])
        if found.data.name not in ("digits", "shapes"):
            config.load([str(file), "data.path=somewhere"])
    sweep = yaml.safe_load((ROOT / "configs/sweeps/learning_rate.yaml").read_text())
    known = config.all_keys({"method": {"name": "mae"}})
    assert set(sweep["parameters"]) <= set(known)
