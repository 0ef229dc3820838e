"""What is installed is the whole of it, and imports run one way."""

import ast
import configparser
from pathlib import Path

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


def _imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mae")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mae":
            yield from ([f"mae.{alias.name}" for alias in node.names] if node.module == "mae" else [node.module])
