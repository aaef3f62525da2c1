"""Import rules: imports go to lower layers, without cycles; only `realm.app` combines all."""

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
"""Packages by layer, lowest first.

A package imports only from lower layers; `realm` itself contains the public names.
"""


def module_name(path: Path) -> str:
    """Dotted name of a module, from its path relative to the root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path.relative_to(ROOT)): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute dotted names of all imports in a module; `from a import b` is `a.b`."""
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
    """The module of this repository that contains an imported name, or None."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def external_and_ours(module: str) -> tuple[set[str], set[str]]:
    """Imports of a module: top-level names of external packages, and modules of this repository."""
    path = MODULES[module]
    names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    ours = {found for name in names if (found := our_module(name)) is not None and found != module}
    return {name.split(".")[0] for name in names} - set(PACKAGES), ours


IMPORTS = {module: external_and_ours(module) for module in MODULES}


def package_of(module: str) -> str:
    """The package in LAYERS that contains a module: the longest matching prefix."""
    matching = [package for layer in LAYERS for package in layer if f"{module}.".startswith(f"{package}.")]
    return max((package for package in matching if package != "realm" or module == "realm"), key=len)


LAYER_OF = {package: number for number, layer in enumerate(LAYERS) for package in layer}


def upward(imports: Mapping[str, set[str]]) -> list[str]:
    """Imports from a package to another one in the same layer or a higher one."""
    found = []
    for module, targets in imports.items():
        for target in sorted(targets):
            here, there = package_of(module), package_of(target)
            if here != there and LAYER_OF[there] >= LAYER_OF[here]:
                found.append(f"{module} → {target}")
    return found


def test_every_file_belongs_to_a_layer():
    assert {package_of(module) for module in MODULES} == set(LAYER_OF)


def test_imports_go_to_lower_layers():
    assert upward({module: ours for module, (_, ours) in IMPORTS.items()}) == []


def test_there_are_no_import_cycles():
    graph = {module: {target for target in ours if target != module} for module, (_, ours) in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_only_the_application_imports_pretraining_and_finetuning():
    importers = {
        package_of(module)
        for module, (_, ours) in IMPORTS.items()
        for target in ours
        if package_of(target) in ("pretrain", "finetune") and package_of(target) != package_of(module)
    }
    assert importers == {"realm.app"}


def test_only_the_index_and_the_baselines_import_faiss():
    users = {module for module, (external, _) in IMPORTS.items() if "faiss" in external}
    assert {package_of(module) for module in users - {"finetune.baselines"}} == {"index"}


def test_imports_to_higher_layers_are_detected():
    wrong = {"realm.text.inputs": {"realm.corpus.prepared"}, "pretrain.ict": {"finetune.metrics", "index.search"}}
    assert upward(wrong) == ["realm.text.inputs → realm.corpus.prepared", "pretrain.ict → finetune.metrics"]


def test_all_kinds_of_import_are_detected():
    inside = "def g():\n    from pretrain.data import NULL\n    from . import config\n    from ..run import folder\n"
    source = f"import faiss.x as f\nfrom index import search\n{inside}"
    expected = {"faiss.x", "index.search", "pretrain.data.NULL", "realm.attention.config", "realm.run.folder"}
    assert imported(source, "realm.attention.new") == expected
