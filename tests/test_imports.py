"""The import rules: every import runs to a lower layer, no two files import each other in a
circle, `realm.app` alone joins all packages."""

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("realm", "index", "pretrain", "finetune")
LAYERS = (
    ("realm.errors",),
    ("realm.runtime",),
    ("realm.text", "realm.spans", "realm.attention", "realm.gazetteer"),
    ("realm.corpus", "realm.models"),
    ("realm.training",),
    ("realm.run",),
    ("realm.bench", "index"),
    ("pretrain", "finetune"),
    ("realm.app",),
    ("realm.__main__", "realm"),
)
"""Rooms, lowest layer first. A room imports only from the layers below its own; `realm` itself
is the package's public names."""


def module_name(path: Path) -> str:
    """Dotted name of a file's module, its path relative to the root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path.relative_to(ROOT)): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere, `from a import b` as `a.b`; relative ones
    made absolute."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def our_module(name: str) -> str | None:
    """The module of ours that an imported name belongs to, or None."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def external_and_ours(module: str) -> tuple[set[str], set[str]]:
    """What a module imports: the other packages' top names, and our own modules."""
    path = MODULES[module]
    names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ours = {found for name in names if (found := our_module(name)) is not None and found != module}
    return {name.split(".")[0] for name in names} - set(PACKAGES), ours


IMPORTS = {module: external_and_ours(module) for module in MODULES}


def room_of(module: str) -> str:
    """The longest room name that the module's name begins with."""
    rooms = [room for layer in LAYERS for room in layer if f"{module}.".startswith(f"{room}.")]
    return max((room for room in rooms if room != "realm" or module == "realm"), key=len)


LAYER_OF = {room: number for number, layer in enumerate(LAYERS) for room in layer}


def upward(imports: Mapping[str, set[str]]) -> list[str]:
    """Imports from a room to another one of its own layer or of a higher one."""
    found = []
    for module, targets in imports.items():
        for target in sorted(targets):
            here, there = room_of(module), room_of(target)
            if here != there and LAYER_OF[there] >= LAYER_OF[here]:
                found.append(f"{module} → {target}")
    return found


def test_every_file_has_a_room():
    assert {room_of(module) for module in MODULES} == set(LAYER_OF)


def test_imports_run_downwards():
    assert upward({module: ours for module, (_, ours) in IMPORTS.items()}) == []


def test_no_files_import_each_other_in_a_circle():
    graph = {module: {target for target in ours if target != module} for module, (_, ours) in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_application_alone_joins_pretraining_and_finetuning():
    importers = {
        room_of(module)
        for module, (_, ours) in IMPORTS.items()
        for target in ours
        if room_of(target) in ("pretrain", "finetune") and room_of(target) != room_of(module)
    }
    assert importers == {"realm.app"}


def test_faiss_belongs_to_the_index_and_the_baselines():
    users = {module for module, (external, _) in IMPORTS.items() if "faiss" in external}
    assert {room_of(module) for module in users - {"finetune.baselines"}} == {"index"}


def test_the_rules_find_what_breaks_them():
    wrong = {"realm.text.inputs": {"realm.corpus.prepared"}, "pretrain.ict": {"finetune.metrics", "index.search"}}
    assert upward(wrong) == ["realm.text.inputs → realm.corpus.prepared", "pretrain.ict → finetune.metrics"]


def test_all_kinds_of_import_are_seen():
    inside = "def g():\n    from pretrain.data import NULL\n    from . import config\n    from ..run import folder\n"
    source = f"import faiss.x as f\nfrom index import search\n{inside}"
    expected = {"faiss.x", "index.search", "pretrain.data.NULL", "realm.attention.config", "realm.run.folder"}
    assert imported(source, "realm.attention.new") == expected
