"""Who may import whom: no circle, arrows that point one way, and what a light import loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import offrl

ROOT = Path(offrl.__file__).parent
# Room -> the rooms that it may use beside itself. A module belongs to the longest name that fits.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeding": set(),
    "system": set(),
    "regularizers": set(),
    "integrations": {"regularizers"},
    "nets": set(),
    "own": {"errors"},
    "envs": {"errors", "own"},
    "engine.method": set(),
    "engine.optim": set(),
    "engine.ranges": set(),
    "data": {"engine.method", "envs", "errors", "nets", "own", "seeding", "system"},
    "algos": {"data", "engine.method", "engine.optim", "nets", "engine.ranges", "regularizers"},
    "engine": {"engine.method", "envs", "errors", "nets.kernels", "seeding"},
    "results": {"data", "envs"},
    "config": {"algos", "data", "engine.method", "envs", "errors", "own", "engine.ranges"},
    "runs": {
        "",  # the version
        "config",
        "data",
        "engine",
        "engine.method",
        "engine.optim",
        "envs",
        "errors",
        "nets",
        "engine.ranges",
        "results",
        "seeding",
        "system",
    },
    "cli": {"", "config", "data", "errors", "own", "runs"},
    "__main__": {"cli"},
    "": set(),  # offrl/__init__.py
}
MOST_LOOSE = 8  # modules at the top of the package


def modules(root: Path) -> dict[str, Path]:
    """Full name -> file of every module of a package."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports, wherever in its file."""
    files = modules(root)
    return {name: set(imported(name, files)) - {name} for name in files}


def imported(name: str, files: Mapping[str, Path]) -> Iterator[str]:
    home = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = home.split(".")[: len(home.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:  # of a package a module or a name
                part = f"{base}.{alias.name}"
                if part in files or base in files:
                    yield part if part in files else base


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of a circle in order, its first one again at the end; [] where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            path.append(node)
            for other in sorted(graph.get(node, ())):
                if found := visit(other):
                    return found
            done.add(path.pop())
        return []

    return next(filter(None, map(visit, sorted(graph))), [])


def upward(graph: Mapping[str, set[str]], package: str, allowed: Mapping[str, set[str]]):
    """Every import that the table does not allow, as "module -> module"."""

    def fits(module: str, room: str) -> bool:
        return f"{module}.".startswith(f"{package}.{room}.") or (not room and module == package)

    for module, others in sorted(graph.items()):
        room = max((room for room in allowed if fits(module, room)), key=len, default=None)
        if room is None:
            yield f"{module} is in no room"
            continue
        rooms = {room, *allowed[room]} if room else allowed[room]
        for other in sorted(others):
            own = max((r for r in {*allowed, *rooms} if r and fits(other, r)), key=len, default="")
            if own not in rooms:
                yield f"{module} -> {other}"


def test_no_import_leads_back_to_where_it_began():
    assert " -> ".join(circle(arrows(ROOT))) == ""


def test_arrows_point_one_way():
    assert list(upward(arrows(ROOT), "offrl", ALLOWED)) == []
    assert circle(ALLOWED) == []


def test_every_room_is_a_package():
    """Others are left out of a wheel."""
    assert {path.parent for path in ROOT.rglob("*.py")} == {
        path.parent for path in ROOT.rglob("__init__.py")
    }


def test_few_modules_stand_outside_of_the_rooms():
    assert len(list(ROOT.glob("*.py"))) <= MOST_LOOSE


LEAF = "x = 1\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a.py": "import house.b\n", "b.py": "from house import c\n", "c.py": LEAF}, []),
        ({"a.py": "import house.b\n", "b.py": "import house.a\n"}, ["a", "b", "a"]),
        (
            {
                "a.py": "from house import b\n",
                "b.py": "from . import c\n",
                "c.py": "from .a import x",
            },
            ["a", "b", "c", "a"],
        ),
        (  # within a function, and for types only
            {
                "a.py": "def f():\n    from house.room.b import x\n",
                "room/__init__.py": LEAF,
                "room/b.py": "if TYPE_CHECKING:\n    from ..a import x\n",
            },
            ["a", "room.b", "a"],
        ),
        (  # of a package its name, which its own module defines
            {
                "room/__init__.py": "from house.room.b import x\n",
                "room/b.py": "from house.room import x",
            },
            ["room", "room.b", "room"],
        ),
    ],
)
def test_circles_are_found(tmp_path, files, found):
    build(tmp_path, files)
    assert circle(arrows(tmp_path / "house")) == [f"house.{name}" for name in found]


def test_imports_that_point_up_are_found(tmp_path):
    files = {
        "low/a.py": "from house.low.b import x\nimport torch\n",
        "low/b.py": "def f():\n    from house import high\n",
        "low/part/c.py": LEAF,
        "high/__init__.py": "from house.low.part import c\nfrom house.low import a\n",
        "attic.py": LEAF,
    }
    build(tmp_path, files)
    table = {"low": set(), "high": {"low.part"}, "": set()}
    assert list(upward(arrows(tmp_path / "house"), "house", table)) == [
        "house.attic is in no room",
        "house.high -> house.low.a",
        "house.low.b -> house.high",
    ]


def build(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_regularizers_load_torch_and_nothing_heavier():
    code = (
        "import sys, torch; before = set(sys.modules); import offrl.regularizers; "
        "print(*sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = out.stdout.split()
    others = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert others <= {"offrl", "torch", "numpy"}
    ours = {name for name in loaded if name.startswith("offrl.")}
    assert all(name.startswith("offrl.regularizers") for name in ours)


def test_every_method_is_complete():
    from offrl import config
    from offrl.engine.method import Method

    for name in config.algorithms():
        assert isinstance(config.method(name), Method)
        told = ast.get_docstring(ast.parse((ROOT / "algos" / f"{name}.py").read_text()))
        assert "Differences from" in (told or ""), f"{name} must name its differences"
        assert (config.folder() / "algo" / f"{name}.yaml").exists()


def test_the_tree_in_the_documents_is_true():
    top = ROOT.parent
    text = (top / "docs" / "design.md").read_text().split("```")[1]
    told: set[str] = set()
    folders: list[str] = []
    for line in text.strip("\n").splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        told.add("/".join(folders))
    assert [name for name in sorted(told) if not (top / name).exists()] == []
    files = {str(path.relative_to(top)) for path in ROOT.rglob("*.py")}
    assert {name for name in files - told if not name.endswith("/__init__.py")} == set()
