"""The arrows between the packages, and the purity of `engines/` (DESIGN: layout)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

PACKAGES = ("engines", "launcher", "proxy")
MAY_IMPORT = {"engines": set(), "launcher": {"engines"}, "proxy": {"engines"}}
DOES_IO = {
    "asyncio", "socket", "selectors", "subprocess", "threading", "multiprocessing", "os", "time", "signal", "http",
    "urllib.request", "httpx", "httptools", "uvicorn", "fastapi", "starlette", "psutil", "shutil", "tempfile",
}  # fmt: skip
EXEMPT = ("engines/sim/", "engines/plugins/")
ROOMS = {
    "proxy/upstream": {"errors"},
    "proxy/downstream": {"errors", "upstream"},
    "proxy/nodes": {"errors", "settings", "upstream"},
    "proxy/routing": {"errors", "nodes"},
    "proxy/simulation": {"nodes", "routing"},
    "proxy/exchange": {"errors", "metrics", "nodes", "routing", "settings", "upstream"},
    "proxy/serving": {"downstream", "errors", "exchange", "metrics", "nodes", "routing", "settings", "upstream"},
    "launcher/plan": {"errors", "private"},
    "launcher/check": {"errors", "plan"},
    "launcher/events": {"errors"},
    "launcher/setup": {"errors", "events", "plan"},
    "launcher/hosts": {"errors", "plan", "private", "setup"},
    "launcher/inspect": {"errors", "hosts", "plan", "private"},
    "launcher/measure": {"check", "errors", "events", "hosts", "inspect", "plan", "private", "run"},
    "launcher/run": {"check", "errors", "events", "hosts", "inspect", "plan", "private", "setup"},
}
"""What each may import of its package, besides itself."""
PURE = ("launcher/plan", "launcher/check", "launcher/run/restarts.py", "launcher/run/liveness.py")
READS_A_FILE = {("config.py", "os"), ("lockfile.py", "os")}
"""What a user gives is a file, or a variable."""
IN_ENGINE_ONLY = {"torch", "vllm", "mooncake", "transformers", "tokenizers"}


def imports(file: Path) -> Iterator[str]:
    """Absolute names of the modules a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def rooms_imported(file: Path) -> Iterator[str]:
    """Names right below the package that a module in a room of it imports, relatively."""
    depth = len(file.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction_only(package: str) -> None:
    forbidden = set(PACKAGES) - {package} - MAY_IMPORT[package]
    wrong = {(f.name, name) for f in modules(package) for name in imports(f) if name.split(".")[0] in forbidden}
    assert wrong == set()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_one_direction_only(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    allowed = ROOMS[room] | {room.split("/")[1]}
    assert {(f.name, name) for f in files for name in rooms_imported(f) if name not in allowed} == set()


@pytest.mark.parametrize("place", PURE)
def test_plans_checks_and_policies_look_at_no_machine(place: str) -> None:
    """All they know of one is in its facts."""
    files = sorted((ROOT / place).rglob("*.py")) or [ROOT / place]
    assert {(f.name, name) for f in files for name in imports(f) if name in DOES_IO} <= READS_A_FILE


def test_the_proxy_names_no_engine() -> None:
    """What it asks of one it asks `engines.base.Engine`."""
    named = {
        (f.name, name)
        for f in modules("proxy")
        for name in imports(f)
        if name.startswith(("engines.vllm", "engines.sim"))
    }
    assert named == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_lives_in_the_engines_environment_is_imported_only_there(package: str) -> None:
    files = [file for file in modules(package) if "plugins" not in file.parts]
    assert {(f.name, name) for f in files for name in imports(f) if name.split(".")[0] in IN_ENGINE_ONLY} == set()


def test_engines_does_no_io() -> None:
    files = [file for file in modules("engines") if not str(file.relative_to(ROOT)).startswith(EXEMPT)]
    assert {(f.name, name) for f in files for name in imports(f) if name in DOES_IO} == set()
    assert {f.name for f in files if "open(" in f.read_text()} == set()


def test_the_top_level_holds_only_what_the_layout_needs() -> None:
    allowed = {
        "pyproject.toml", "README.md", "proxy", "launcher", "engines", "tests", "examples", "LICENSE", "CHANGELOG.md",
        "Makefile",
    }  # fmt: skip
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} <= allowed
