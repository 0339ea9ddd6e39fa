"""Imports of the package run downwards only: no circle between rooms or files, and each room stands on its floor."""
from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "moduli_kernels"

# Each floor imports from the floors below it alone. A room is a folder of the package, or a single file in it.
FLOORS = [
    {"_version", "autograd", "checks", "distributed", "graphs", "runtime"},
    {"backends", "masks", "models"},
    {"geometry"},
    {"pruning", "reference"},
    {"ops"},
    {"penalty", "rnn", "triton"},
    {"env_report", "histograms", "lightning"},
    {"plots"},
    {"__init__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: pathlib.Path, package: pathlib.Path) -> tuple[str, ...]:
    """("rnn", "layer") for rnn/layer.py, ("rnn",) for rnn/__init__.py, () for the package's own __init__.py."""
    parts = path.relative_to(package).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path: pathlib.Path, package: pathlib.Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports anywhere in it, but for `if TYPE_CHECKING:`, which never runs."""
    module = module_of(path, package)
    here = module if path.name == "__init__.py" else module[:-1]
    modules = {module_of(each, package) for each in package.rglob("*.py")}
    tree = ast.parse(path.read_text())
    unused = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
              and ast.unparse(block.test) == "TYPE_CHECKING" for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = (*here[:len(here) + 1 - node.level], *named)
            elif named[:1] == (package.name,):
                base = named[1:]
            else:
                continue
            for alias in node.names:
                yield (*base, alias.name) if (*base, alias.name) in modules else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package.name:
                    yield tuple(alias.name.split(".")[1:])


def circles_and_climbs(package: pathlib.Path) -> list[str]:
    """What is wrong with the imports, in words."""
    found, files = [], {}
    for path in sorted(package.rglob("*.py")):
        module = module_of(path, package)
        room = module[0] if module else "__init__"
        files[module] = {other for other in imports_of(path, package) if other != module}
        for other in files[module]:
            if (below := other[0] if other else "__init__") != room and FLOOR_OF[below] >= FLOOR_OF[room]:
                found.append(f"{'.'.join(module)} imports {'.'.join(other)}, which stands no floor lower")
    try:
        TopologicalSorter(files).prepare()
    except ValueError as error:
        found.append(f"files import each other in a circle: {' > '.join('.'.join(each) for each in error.args[1])}")
    return found


def test_imports_run_downwards():
    assert circles_and_climbs(PACKAGE) == []


def test_every_room_has_a_floor():
    rooms = {module_of(path, PACKAGE)[0] for path in PACKAGE.rglob("*.py") if module_of(path, PACKAGE)}
    assert rooms == set(FLOOR_OF) - {"__init__"}


@pytest.mark.parametrize("files, complaint", [
    ({"masks/__init__.py": "from .. import ops", "ops/__init__.py": ""},
     "masks imports ops, which stands no floor lower"),
    ({"geometry/__init__.py": "", "geometry/a.py": "from .b import x", "geometry/b.py": "def f():\n from . import a"},
     "files import each other in a circle"),
    ({"checks.py": "import moduli_kernels.backends", "backends.py": ""}, "checks imports backends"),
])
def test_what_climbs_is_found(tmp_path, files, complaint):
    package = tmp_path / "moduli_kernels"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert any(complaint in each for each in circles_and_climbs(package))


def test_no_module_has_the_name_of_a_function_that_it_exports():
    """Except env_report, whose package is the command `python -m moduli_kernels.env_report`."""
    twice = []
    for path in PACKAGE.rglob("*.py"):
        name = module_of(path, PACKAGE)[-1:]
        defined = {node.name for node in ast.parse(path.read_text()).body
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        if name and name[0] in defined:
            twice.append(str(path.relative_to(PACKAGE)))
    assert twice == ["env_report/__init__.py"]
