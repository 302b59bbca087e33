"""The rules of the house: who may import whom, and how long a numbered script is."""

import ast
import sys
from graphlib import TopologicalSorter

from tests.conftest import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("backends", "data", "stages")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
NUMBERED = {name: path for name, path in FILES.items() if name.startswith("stages.0")}
FLOORS = ("backends", "data", "stages.method", "stages.run")
MAY_IMPORT = {
    "backends": ("backends",),
    "data": ("backends", "data"),
    "stages.method": ("stages.method",),
    "stages.run": FLOORS,
    "stages.06_correlate": (*FLOORS, "stages.report"),
    **{room: (*FLOORS, room) for room in ("stages.report", "stages.checks", "stages.scale")},
    **{name: FLOORS for name in NUMBERED if name != "stages.06_correlate"},
}
"""room -> rooms of the project that its files may import"""


def imports(name: str) -> set[str]:
    """The modules that a file of ours imports, anywhere in it, as full names."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in FILES else node.module for module in modules}
    return found


def within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_no_import_runs_upwards():
    for name in FILES:
        room = next((room for room in MAY_IMPORT if within(name, (room,))), None)
        for module in imports(name) & FILES.keys():
            assert module not in NUMBERED, f"{name} imports {module}: only stages.run.pipeline may load it"
            assert room is None or within(module, MAY_IMPORT[room]), f"{name} imports {module}"
        if room == "stages.method":
            libraries = {module.split(".")[0] for module in imports(name)} - sys.stdlib_module_names
            assert libraries <= {"numpy", "scipy", "stages"}, f"{name} imports {libraries}"


def test_only_the_pipeline_loads_numbered_scripts():
    loaders = [name for name, path in FILES.items() if 'import_module(f"stages.' in path.read_text("utf-8")]
    assert loaders == ["stages.run.pipeline"]


def test_no_circle():
    graph = {name: (imports(name) & FILES.keys()) - {name} for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_numbered_scripts_are_short():
    for name, path in NUMBERED.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") < 200, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"
