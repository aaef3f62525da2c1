"""The import rule: `realm` ← `index` ← `pretrain`, `finetune`, and parts of `realm` that stand alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("realm", "index", "pretrain", "finetune")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
COMPOSE = {path for path in MODULES if path.is_relative_to("realm/cli")} | {
    Path("realm/pipeline.py"),
    Path("realm/plan.py"),
    Path("realm/calibrate.py"),
}
"""The modules that put the packages together."""

FORBIDDEN = {
    "realm": {"index", "pretrain", "finetune", "faiss"},
    "index": {"pretrain", "finetune"},
    "pretrain": {"finetune"},
    "finetune": {"pretrain"},
}
ALONE = {
    "realm/attention": {"realm.errors", "realm.attention"},
    "realm/objectives.py": {"realm.errors"},
    "realm/publish.py": {"realm.errors"},
}


def imported(source: str, module: Path) -> set[str]:
    """Dotted names that a module imports anywhere, `from a import b` as `a.b`; relative ones made absolute."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.parent.parts[: len(module.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_of(module: Path) -> set[str]:
    return imported((ROOT / module).read_text(encoding="utf-8"), module)


def test_every_package_is_looked_at():
    assert {path.parts[0] for path in MODULES} == set(PACKAGES)
    assert set(MODULES) > COMPOSE


@pytest.mark.parametrize("module", [path for path in MODULES if path not in COMPOSE], ids=str)
def test_packages_import_downwards(module):
    tops = {name.split(".")[0] for name in imports_of(module)}
    assert not tops & FORBIDDEN[module.parts[0]]


@pytest.mark.parametrize("module", sorted(COMPOSE), ids=str)
def test_the_composing_modules_leave_faiss_to_the_index(module):
    assert "faiss" not in {name.split(".")[0] for name in imports_of(module)}


@pytest.mark.parametrize(("part", "allowed"), ALONE.items(), ids=ALONE)
def test_parts_that_stand_alone(part, allowed):
    modules = [path for path in MODULES if path.is_relative_to(part)]
    assert modules
    for module in modules:
        ours = {name for name in imports_of(module) if name.split(".")[0] in PACKAGES}
        assert [name for name in ours if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)] == []


def test_all_kinds_of_import_are_seen():
    inside = "def g():\n    from pretrain.data import NULL\n    from . import config\n    from ..index import build\n"
    source = f"import faiss.x as f\nfrom index import search\n{inside}"
    expected = {"faiss.x", "index.search", "pretrain.data.NULL", "realm.attention.config", "realm.index.build"}
    assert imported(source, Path("realm/attention/new.py")) == expected
