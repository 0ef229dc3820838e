"""What is installed is the whole of it, and imports run one way."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from mae import __main__ as program
from mae.version import __version__

ROOT = Path(__file__).parents[1]
# who may import whom: nets know nothing of the rest, commands join everything
ALLOWED = {
    "nets": {"nets"},
    "methods": {"methods", "nets"},
    "data": {"data", "nets"},
    "training": {"training", "methods", "data", "nets"},
    "evaluation": {"evaluation", "methods", "data", "nets"},
    "reporting": {"reporting"},
    "interop": {"interop", "methods", "nets"},
}
EVERYWHERE = {"keys", "config", "errors", "units", "version"}


def test_every_package_and_every_configuration_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    assert listed == {"mae.configs", *(".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "mae").rglob("__init__.py"))}
    pattern = setup["options.package_data"]["mae.configs"]
    assert set((ROOT / "configs").rglob("*.yaml")) == set((ROOT / "configs").glob(pattern))


def test_imports_run_one_way():
    for part, allowed in ALLOWED.items():
        for file in (ROOT / "mae" / part).rglob("*.py"):
            for name in _imported(file):
                top = name.split(".")[1] if "." in name else ""
                assert top in allowed | EVERYWHERE, f"{file.relative_to(ROOT)} imports {name}"


def test_methods_know_nothing_of_ranks():
    for file in (ROOT / "mae" / "methods").rglob("*.py"):
        assert "distributed" not in file.read_text(), file


def test_the_tools_fit_on_one_screen_and_the_version_names_what_matters(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mae", "--help"])
    assert program.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    monkeypatch.setattr(sys, "argv", ["mae", "--version"])
    assert program.main() == 0
    assert capsys.readouterr().out.startswith(f"mae {__version__} (Python 3.")


def test_no_command_needs_torch_before_its_words_are_read():
    every = "; ".join(f"import mae.commands.{name}" for name in program.TOOLS)
    probe = f"import sys; {every}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_a_wheel_holds_every_module_and_configuration(tmp_path):
    for name in ("mae", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    pytest.importorskip("setuptools", minversion="77")
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"  # what pip calls
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("mae-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mae/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")} <= held
    assert {str(f.relative_to(ROOT)) for f in (ROOT / "mae").rglob("*.py")} | {"mae/py.typed"} <= held


def test_the_workflow_runs_what_our_own_check_runs_on_every_python_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the bare word on as true, and GitHub knows
    own = [line.replace(" --quiet", "") for line in (ROOT / ".ci/run").read_text().splitlines()]
    steps = [command for step in job["steps"] for command in step.get("run", "").split(" && ") if command]
    assert steps == own[own.index("pip install -e '.[dev]'") :]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    promised = [line.split(" :: ")[-1] for line in setup["metadata"]["classifiers"].splitlines() if "Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == promised
    assert setup["options"]["python_requires"] == f">={promised[0]}"
    assert job["steps"][1]["with"]["cache-dependency-path"] in os.listdir(ROOT)


def test_the_image_is_given_all_that_its_steps_ask_for():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == let_in == {"mae", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"}  # as the wheel is made of
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    [install] = [line for line in lines if "pip install" in line]
    assert re.search(r"'\.\[(\w+)\]'", install)[1] in setup["options.extras_require"]
    [entry] = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("ENTRYPOINT")]
    assert [f"{entry[0]} = mae.__main__:main"] == setup["options.entry_points"]["console_scripts"].split("\n")[1:]


def _imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mae")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mae":
            yield from ([f"mae.{alias.name}" for alias in node.names] if node.module == "mae" else [node.module])


def test_every_benchmark_finds_what_it_imports():
    names = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
    probe = f"import sys; sys.path.insert(0, 'benchmarks'); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
