"""Arrows between modules: which imports which, read off the source. No circle, no arrow up, one way of writing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrgi_kernels import names

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"entrgi_kernels": ROOT, "entrgi": ROOT / "python"}
# Of the rooms of entrgi_kernels, each with those that it may import; its own modules always.
BELOW = {
    "backends": set(),
    "ops": {"backends"},
    "text": set(),
    "models": set(),
    "rewards.decoding": {"models", "text"},
    "rewards.verifiers": set(),
    "rewards": {"models", "ops", "rewards.decoding", "rewards.verifiers", "text"},
    "guidance": {"backends", "models", "ops", "rewards", "rewards.decoding", "text"},
    "integrations": {"backends", "guidance", "models", "ops", "rewards", "text"},
}
NAMES = "entrgi_kernels.names"  # what a user chooses among
COMMON = {NAMES, "entrgi_kernels.shortage"}  # every room may read them, and they read none


def modules_of(sources: dict[str, Path]) -> dict[str, Path]:
    """Every module's file, by its full name; a package goes by its own."""
    found = {}
    for package, root in sources.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports below a node, inside functions too; those for type checkers alone left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(other)
        else:
            yield from statements(child)


def target_of(statement: ast.ImportFrom, name: str, path: Path) -> str:
    """The module that a ``from`` names, in full."""
    if not statement.level:
        return statement.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    return ".".join([*package[: len(package) - statement.level + 1], *filter(None, [statement.module])])


def arrows_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the others. A name that is a module is an arrow to it, not to its package."""
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = []
        for statement in statements(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                imported += [alias.name for alias in statement.names]
                continue
            source = target_of(statement, name, path)
            inner = [f"{source}.{alias.name}" for alias in statement.names]
            imported += [one if one in modules else source for one in inner]
        arrows[name] = {one for one in imported if one in modules}
    return arrows


def circles_of(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Ways that come back to where they began: one each time that a search meets a module it is still inside of."""
    found, done, way = [], set(), []

    def visit(name: str) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            way.append(name)
            for other in sorted(arrows[name]):
                visit(other)
            done.add(way.pop())

    for name in arrows:
        visit(name)
    return found


def room_of(name: str) -> str:
    """The room of a module of entrgi_kernels; "" for the package itself and its own files."""
    parts = name.split(".")[1:]
    return next((room for room in (".".join(parts[:2]), parts[0] if parts else "") if room in BELOW), "")


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return modules_of(SOURCES)


@pytest.fixture(scope="module")
def arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    return arrows_of(modules)


def test_there_is_no_import_circle(arrows: dict[str, set[str]]) -> None:
    assert not [" → ".join(circle) for circle in circles_of(arrows)]


def test_no_arrow_goes_up(arrows: dict[str, set[str]]) -> None:
    wrong = [
        f"{name} → {other}"
        for name, others in arrows.items()
        for other in others
        if name.startswith("entrgi_kernels")
        and other not in COMMON
        and (not other.startswith("entrgi_kernels") or room_of(other) not in BELOW.get(room_of(name), set(BELOW)))
        and room_of(other) != room_of(name)
    ]
    assert not wrong


def test_every_room_is_known(modules: dict[str, Path]) -> None:
    folders = {path.parent.name for path in (ROOT / "entrgi_kernels").glob("*/__init__.py")}
    assert folders == {room for room in BELOW if "." not in room}


def test_imports_inside_a_package_are_relative(modules: dict[str, Path]) -> None:
    absolute = [
        f"{path.relative_to(ROOT)}:{statement.lineno}"
        for name, path in modules.items()
        for statement in statements(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(statement, ast.ImportFrom)
        and not statement.level
        and (statement.module or "").partition(".")[0] == name.partition(".")[0]
    ]
    assert not absolute


def test_there_is_one_hand(modules: dict[str, Path]) -> None:
    """torch.Tensor is written out, and an error says what was "expected", not what is "accepted"."""
    found = []
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            tensor = isinstance(node, ast.ImportFrom) and node.module == "torch"
            if tensor and any(alias.name == "Tensor" for alias in node.names):
                found.append(f"{name}:{node.lineno} imports Tensor")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "accepted: " in node.value:
                found.append(f"{name}:{node.lineno} says what is accepted")
    assert not found


def lists_of_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, which): displays in the source that spell a list of `names` out once more."""
    lists = {key: set(value) for key, value in vars(names).items() if key.isupper()}
    for node in ast.walk(tree):
        entries = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", ())
        spelled = {entry.value for entry in entries if isinstance(entry, ast.Constant)}
        yield from ((node.lineno, key) for key, value in lists.items() if value <= spelled)  # type: ignore[attr-defined]


def test_lists_of_names_stand_once(modules: dict[str, Path], arrows: dict[str, set[str]]) -> None:
    found = [
        f"{name}:{line} {which}"
        for name, path in modules.items()
        if name != NAMES
        for line, which in lists_of_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found
    assert not any(arrows[name] for name in COMMON)
    assert [which for _, which in lists_of_names(ast.parse('x = ["even", "linspace", "other"]'))] == ["SCHEDULES"]


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "from .b import one\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import d\n",
        "b.py": "def f():\n    from house import c\n",
        "c.py": "import house.a\n",
        "d.py": "from . import a\n",
    }
    (tmp_path / "house").mkdir()
    for name, text in files.items():
        (tmp_path / "house" / name).write_text(text)
    arrows = arrows_of(modules_of({"house": tmp_path}))
    assert circles_of(arrows) == [["house.a", "house.b", "house.c", "house.a"]]
