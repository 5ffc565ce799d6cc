"""Dependencies between the packages, checked by parsing the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tljax").rglob("*.py"))
# From bottom to top: a package may import itself and the packages of earlier lines.
ORDER = (
    {"runtime"},
    {"metrics"},
    {"attack", "explain"},
    {"models"},
    {"pretrained", "data"},
    {"features"},
    {"train"},
    {"studies"},
    {"report"},
    {"commands"},
)
FOREIGN = ("torch", "torchvision", "transformers", "tensorflow", "keras", "timm")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def package(path: Path) -> str:
    parts = path.relative_to(ROOT / "tljax").parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_packages_below_its_own(path: Path):
    if not package(path):
        return
    names = {name.split(".")[1] for name in imported(path) if name.startswith("tljax.")}
    packages = {name for name in names if (ROOT / "tljax" / name).is_dir()}
    level = next(i for i, line in enumerate(ORDER) if package(path) in line)
    assert packages <= {package(path)}.union(*ORDER[:level])
    assert not any(name.split(".")[0] == "scripts" for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_models_import_flax(path: Path):
    imports_flax = any(name.split(".")[0] == "flax" for name in imported(path))
    assert not imports_flax or package(path) == "models"


def family_files() -> list[Path]:
    from tljax.models import MODELS

    modules = {builder.func.__module__ for builder in MODELS.values()}
    return sorted(ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in modules)


@pytest.mark.parametrize("path", family_files(), ids=lambda path: path.stem)
def test_a_family_is_one_file_and_its_tables(path: Path):
    """Beside them it needs its lines in MODELS and in the list of tables, and nothing else.

    Its weights are rows of the catalog, and its reference is in tests/references.
    """
    family, pretrained = path.stem, ROOT / "tljax" / "pretrained"
    users = {file for file in FILES if f"tljax.models.{family}" in imported(file)} - {path}
    places = {ROOT / "tljax" / "models", pretrained / "tables"}
    assert {file.parent for file in users} <= places
    # A family may have further tables, such as vit_huggingface.
    own = f"tljax.pretrained.tables.{family}"
    tables = {
        file
        for file in FILES
        if any(name == own or name.startswith(f"{own}_") for name in imported(file))
        if not file.stem.startswith(family)
    }
    assert tables <= {pretrained / "tables" / "layouts.py"}
    lines = (ROOT / "tljax" / "models" / "__init__.py").read_text("utf-8").count(f"{family}.")
    assert 2 <= lines <= 6, "at most three lines of MODELS, each with a builder and its names"


def test_the_rules_can_fail(tmp_path: Path):
    file = tmp_path / "x.py"
    file.write_text("from flax import linen\ndef f():\n    import tljax.train.fit\n")
    assert {"flax", "tljax.train.fit"} <= imported(file)


def test_no_module_imports_torch_or_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
    ]
    code = (
        f"import sys; [__import__(name) for name in {modules}];"
        f"print([name for name in {FOREIGN} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"


def test_importing_tljax_imports_neither_jax_nor_flax():
    code = (
        "import sys, tljax, tljax.commands.cli;"
        "print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"


def test_a_command_compares_paths_before_jax_is_configured():
    """As the command that began a run does when it is repeated."""
    code = (
        "import sys; from tljax.commands.train import _place;"
        "print(_place('data', 'missing/*.tar'), 'jax' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == f"{ROOT / 'missing/*.tar'} False"


def test_every_public_name_can_be_imported():
    import tljax

    assert all(getattr(tljax, name) is not None for name in tljax.__all__)
    with pytest.raises(AttributeError, match="No tljax attribute resnet5O"):
        _ = tljax.resnet5O
