"""What is installed is the whole of it, and imports run one way."""

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def _imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mae")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mae":
            yield from ([f"mae.{alias.name}" for alias in node.names] if node.module == "mae" else [node.module])
