"""`import realm`: instant, complete, and the same to Python and to type checkers."""

import ast
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

import realm

ROOT = Path(__file__).resolve().parents[1]


def test_import_is_instant() -> None:
    heavy = {"torch", "transformers", "faiss", "numpy", "spacy", "index"}
    program = f"import sys, realm; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("name", realm.__all__)
def test_every_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(realm, name)
    if name != "__version__":
        assert value is getattr(import_module(realm._MODULE_OF[name]), name)
        assert value.__doc__, "a public name is documented"


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'realm' has no attribute 'load_retreiver'"):
        realm.load_retreiver  # noqa: B018
    with pytest.raises(ImportError):
        from realm import load_retreiver  # noqa: F401


def test_type_checkers_and_the_table_agree() -> None:
    (block,) = (node for node in ast.parse(Path(realm.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.asname: node.module for node in imports for alias in node.names} == realm._MODULE_OF
    assert sorted([*realm._MODULE_OF, "__version__"]) == realm.__all__


def test_public_modules_are_type_checked_strictly() -> None:
    (override,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    strict = [pattern.removesuffix(".*") + "*" if pattern.endswith(".*") else pattern for pattern in override["module"]]
    modules = {"realm", *realm._MODULE_OF.values()}
    assert [module for module in modules if not any(fnmatch(module, pattern) for pattern in strict)] == []


def test_dir_lists_the_public_names() -> None:
    assert set(realm.__all__) <= set(dir(realm))


@pytest.mark.parametrize("package", ["realm", "index", "pretrain", "finetune"])
def test_packages_are_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
