"""The pages keep their word: links lead somewhere, keys and files exist, every command and every block of Python runs.

`pytest -m slow tests/test_docs.py -k small_data` runs those of one page; those of the quick start run by default.
"""

import ast
import configparser
import functools
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import torch
from docs_pages import PAGES, PLACES, ROOT, anchors, blocks, commands, config_files, inline_commands, installs, keys, launches, links
from docs_world import World, run, small
from torch.distributed.run import get_args_parser

import mae
import mae.methods
from mae import config
from mae.__main__ import TOOLS
from mae.errors import ConfigError

# why a command is not run: its words are checked all the same
NOT_RUN = {
    "ladder": "trains every method; tests/test_ladder.py runs it",
    "docs/pretrain.sbatch": "needs Slurm; tests/test_cluster.py runs the template",
    "sharpen": "a method that is not there: tests below",
    "WORDS": "stands for the words of other commands",
    "benchmarks/": "takes minutes",
    "mae.training.scaling": "prints what tests/test_estimate.py compares",
}
CONFIGURED = {"pretrain", "doctor", "data", "statistics", "ladder", "evaluate", "linear_probe", "finetune"}
DEFAULT = {"linear_probe": ["configs/evaluation/linear_probe_quick.yaml"], "finetune": ["configs/evaluation/finetune_paper.yaml"]}
COMMANDS = [
    pytest.param(command, id=f"{page.stem}-{command.line[:70]}")
    for page in PAGES
    for command in commands(page) + inline_commands(page)
    if command.story != "shell"
]
RUN = [pytest.param(page, id=page.stem, marks=[] if page.stem == "quick_start" else pytest.mark.slow) for page in PAGES]


def page_id(page):
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for text, target in links(page):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), f"[{text}]({target})"
            assert not anchor or anchor in anchors(there), f"[{text}]({target})"


@functools.cache
def known_keys():
    known = set(config.all_keys({}))
    for section, folder in (("method", "methods"), ("protocol", "evaluation")):
        for file in (config.configs_folder() / folder).glob("*.yaml"):
            known |= {f"{section}.{key}" for key in config.schema(section, file.stem)}
    return known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_keys_and_files_that_are_named_exist(page):
    own = set(re.findall(r"^  (\w+): ", "\n".join(blocks(page, "yaml")), re.MULTILINE))  # of a method that the page adds
    assert [key for key in keys(page) if key not in known_keys() and key.split(".")[1] not in own] == []
    shown = "\n".join(blocks(page, "yaml", "python"))
    assert [file for file in config_files(page) if not (ROOT / file).is_file() and file not in page.read_text().replace(shown, "")] == []


def missing(module, names):
    """Those that a module of the package has neither as a name nor, for an import, as a module of its own."""
    found = importlib.import_module(module)
    return [name for name in names if not hasattr(found, name) and importlib.util.find_spec(f"{module}.{name}") is None]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_is_python_and_takes_from_mae_what_is_there(page):
    lost = []
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block, page.name)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "mae":
                lost += missing(node.module, [alias.name for alias in node.names])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mae":
                lost += [node.attr] if not hasattr(mae, node.attr) else []
    assert lost == []


def test_what_launches_ranks_and_what_is_installed_exists():
    parser = get_args_parser()
    parser.error = pytest.fail  # it would end the process
    for words in [words for page in PAGES for words in launches(page)]:
        assert parser.parse_args([PLACES.get(word, word) for word in words]).training_script
    extras = configparser.ConfigParser()
    extras.read(ROOT / "setup.cfg")
    named = {extra for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for words in installs(page) for extra in words.split(",")}
    assert {"dev"} <= named <= set(extras["options.extras_require"])


@pytest.mark.parametrize("page", PAGES[1:], ids=page_id)
def test_a_page_opens_with_a_command(page):
    assert re.match(r"# [^\n]+\n\n```\n(\$ )?(python|mae|torchrun|cat|uv|pip) ", page.read_text())


def test_the_readme_names_every_page():
    named = {target.partition("#")[0] for _, target in links(ROOT / "README.md")}
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in named] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_words_of_a_command_are_words_that_exist(command):
    module = command.story.removesuffix(".py").replace("/", ".")
    assert command.story in TOOLS or (ROOT / command.story).is_file() or importlib.util.find_spec(module)
    words = [w for w in command.words if re.match(r"configs/|[a-z]+\.\w+=", w) and not w.startswith("encoder.from=")]
    if command.story in CONFIGURED and not command.refusal:
        words = [*DEFAULT.get(command.story, []), *words]
        config.load([w for w in words if (ROOT / w).is_file() or "=" in w])  # a file that a page makes is not there yet


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """A copy of the project, with the method that docs/add_a_method.md adds; this process finds it there."""
    for folder in ("mae", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pretrain.py"):
        shutil.copy(ROOT / name, tmp_path)
    page = ROOT / "docs" / "add_a_method.md"
    (tmp_path / "mae" / "methods" / "sharpen.py").write_text(blocks(page, "python")[0])
    (tmp_path / "configs" / "methods" / "sharpen.yaml").write_text(blocks(page, "yaml")[0])
    monkeypatch.setattr(config, "configs_folder", lambda: tmp_path / "configs")
    monkeypatch.setattr(mae.methods, "__path__", [str(tmp_path / "mae" / "methods")])
    yield tmp_path
    sys.modules.pop("mae.methods.sharpen", None)


def test_the_method_that_is_added_in_one_file_is_found_and_learns(extended):
    import test_methods

    test_methods.test_the_yaml_lists_every_argument_with_its_default("sharpen")
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    test_methods.test_every_parameter_learns_and_the_loss_falls("sharpen", images)
    with pytest.raises(ConfigError, match=r"method\.factor 1 must be at least 2"):
        mae.create(["configs/methods/sharpen.yaml", "method.factor=1"])


@pytest.mark.slow
def test_the_method_that_is_added_trains_as_a_program(extended):
    (command,) = [c for c in commands(ROOT / "docs" / "add_a_method.md") if "sharpen.yaml" in c.line]
    words = small("pretrain", command.words)
    done = subprocess.run([sys.executable, "pretrain.py", *words], cwd=extended, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (extended / "runs" / "digits-sharpen" / "encoder").is_dir()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("docs") / "home")


@pytest.mark.parametrize("page", RUN)
def test_the_commands_and_the_python_of_a_page_run(page, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(world.page(tmp_path / "work"))
    for command in commands(page):
        if command.story == "shell":
            world.shell(command.line)
        if command.story == "shell" or any(name in command.line or name == command.story for name in NOT_RUN):
            continue
        words = small(command.story, command.words) if not command.refusal else command.words
        world.prepare(words)
        capfd.readouterr()
        code, said = run(command.story, words), capfd.readouterr().err
        assert code == (2 if command.refusal else 0), f"{command.line}\n{said[-2000:]}"
        assert command.refusal.split(" (")[0] in said, f"{command.line}\n{said[-2000:]}"
    for block in blocks(page, "python"):
        world.execute(block)
