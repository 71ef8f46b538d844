"""Rules of the code base that a machine can hold: layers, sizes, names, documents that match."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from uml_fast.kernels import SPECS
from uml_fast.kernels.spec import KernelSpec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "uml_fast"

LAYERS = (
    ("networks", "optim", "config", "_native", "_native_cuda"),
    ("runtime",),
    ("kernels",),
    ("packing", "cost"),
    ("modalities",),
    ("model", "nn"),
    ("data",),
    ("distributed",),
    ("encoders", "grid"),
    ("recipes", "doctor", "cli"),
    ("analysis",),
    ("training",),
    ("report",),
    ("experiment",),
    (
        "train",
        "search",
        "evaluate",
        "analyse",
        "export",
        "plan",
        "prepare",
        "inspect",
        "extract",
    ),
)
"""Parts of the package: each imports its own line and the lines above it, never one below."""

CORE = {name for layer in LAYERS[: LAYERS.index(("report",))] for name in layer}
"""Parts that import with torch and numpy alone; what they need beyond is imported where used."""

MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
GENERATED = {".git", ".venv", "build", "dist", "runs", "__pycache__", "results", "shared"}


def files(*patterns: str) -> list[Path]:
    """Source files of the repository, without what is built or written by runs."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in GENERATED]
    found = [p for folder in folders for pattern in patterns for p in folder.rglob(pattern)]
    return sorted(p for p in found if not GENERATED & set(p.relative_to(ROOT).parts))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in files("*.py") if p.is_relative_to(PACKAGE)}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST) -> set[str]:
    """uml_fast modules that a module imports, at any depth; annotations alone do not count."""
    found = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if is_type_checking(node):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import from the package's full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {n for n in names if n in MODULES}
            found |= inner or {node.module or ""}
    return {name for name in found if name.startswith("uml_fast.")}


def part(module: str) -> str:
    """Part of the package a module belongs to: the name after ``uml_fast``."""
    return module.split(".")[1]


GRAPH = {name: imports(ast.parse(path.read_text("utf-8"))) for name, path in MODULES.items()}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def test_the_import_scanner_sees_every_form_of_import() -> None:
    tree = ast.parse(
        "import uml_fast.packing.pack\n"
        "from uml_fast import config\n"
        "from uml_fast.data.source import Source\n"
        "if TYPE_CHECKING:\n    from uml_fast.cli import main\n"
        "def f():\n    from uml_fast.runtime.device import has_bf16\n"
    )
    expected = {"packing.pack", "config", "data.source", "runtime.device"}
    assert imports(tree) == {f"uml_fast.{name}" for name in expected}


def test_every_part_of_the_package_has_a_layer() -> None:
    missing = {part(m) for m in MODULES if m != "uml_fast"} - RANK.keys()
    assert not missing, f"give {sorted(missing)} a place in LAYERS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_layers_only(module: str) -> None:
    if module == "uml_fast":
        assert not GRAPH[module], "uml_fast/__init__.py imports nothing, so that any part loads"
        return
    upward = {m for m in GRAPH[module] if RANK[part(m)] > RANK[part(module)]}
    assert not upward, f"{module} imports {sorted(upward)}, which lie below it in LAYERS"


def test_no_import_cycles() -> None:
    graph = {m: {i for i in found if i in MODULES} for m, found in GRAPH.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_core_imports_with_torch_and_numpy_alone() -> None:
    """Every other package is imported where it is used, so a missing one stops that use alone."""
    core = [m for m in MODULES if m != "uml_fast" and part(m) in CORE and ".triton." not in m]
    code = """
import importlib, importlib.metadata, re, sys
import numpy, torch
torch_needs = [re.match(r"[\\w-]+", r)[0] for r in importlib.metadata.requires("torch") or ()]
allowed = {"torch", "numpy", "uml_fast", "functorch", "torchgen", "mpmath", "markupsafe"}
allowed |= {name.replace("-", "_") for name in torch_needs} | set(sys.stdlib_module_names)
allowed |= {"spmd_types"}  # torch.distributed looks whether it is there
allowed -= {"triton"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

for name in list(sys.modules):
    if name.partition(".")[0] in ("triton", "tyro", "safetensors", "sklearn", "scipy"):
        del sys.modules[name]
sys.meta_path.insert(0, Blocker())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""
    command = [sys.executable, "-c", code, *core]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_file_is_too_long() -> None:
    sizes = {
        str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines())
        for p in files("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    }
    assert sizes
    long = {name: n for name, n in sizes.items() if n > MAX_LINES}
    assert not long, f"split these by job: {long}"


def test_no_vague_file_names() -> None:
    vague = [str(p) for p in files("*.py", "*.cpp", "*.h", "*.cu") if p.stem in VAGUE_NAMES]
    assert not vague, f"name these after their job: {vague}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_kernel_has_its_parts(spec: KernelSpec) -> None:
    assert (ROOT / f"tests/kernels/test_{spec.name}.py").is_file()
    for choice in ("native", "triton"):
        assert f"uml_fast.kernels.{choice}.{spec.name}" in MODULES
    assert spec.tests and spec.benches and spec.aot
    rows = [json.loads(p.read_text())["rows"] for p in (ROOT / "bench/results").glob("kernels_*")]
    assert any(r["op"] == spec.name for found in rows for r in found), "no bench row is committed"


def tree_paths(text: str) -> set[str]:
    """Paths of the README's ``tree`` block: one a line, two spaces an inner level, then words."""
    block = re.search(r"^```tree\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no ```tree block"
    parents: list[str] = []
    paths = set()
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name]
        paths.add("".join(parents))
    return paths


def test_readme_tree_matches_the_disk() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    listed = tree_paths(readme.read_text("utf-8"))
    gone = {p for p in listed if not (ROOT / p).exists()}
    assert not gone, f"README lists what does not exist: {sorted(gone)}"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = [Path(p) for p in tracked.stdout.split()]
    expected = {f"{p.parts[0]}/" for p in paths if len(p.parts) > 1 and p.parts[0][0] != "."}
    inside = [p for p in paths if p.parts[0] == "uml_fast" and p.name != "__init__.py"]
    expected |= {"/".join(p.parts[:2]) + "/" * (len(p.parts) > 2) for p in inside}
    assert not expected - listed, f"README does not list {sorted(expected - listed)}"
