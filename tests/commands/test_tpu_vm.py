"""scripts/tpu_vm.sh with a stub of Python: what it runs the first and the second time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Logs its arguments; `-m venv --clear FOLDER` installs the stub itself and a stub of tljax there.
STUB = """#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in
"-m venv --clear "*)
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
    cp "$0" "$4/bin/tljax" ;;
"-c "*) exit "${OLD:-0}" ;;
"-m pip install"*) exit "${OFFLINE:-0}" ;;
doctor) exit "${PROBLEMS:-0}" ;;
esac
"""

VENV = "stub -m venv --clear .venv"
INSTALL = "python -m pip install --quiet --config-settings editable_mode=compat --editable .[tpu]"
OPTIONS = ("EXTRAS", "NO_DOCTOR", "PYTHON", "VENV")
CHECK = "python -m pip --version"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "tpu_vm.sh", tmp_path / "scripts")
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


def run(checkout: Path, **variables: str) -> tuple[int, list[str]]:
    """Run the script from another folder; return its exit code and the commands that it ran."""
    log = checkout / "log"
    log.write_text("")
    # What the caller of the tests exports (`make VENV=...` does) must not reach the script.
    inherited = {name: value for name, value in os.environ.items() if name not in OPTIONS}
    environment = {"PYTHON": str(checkout / "stub"), "LOG": str(log), **variables}
    done = subprocess.run(
        [checkout / "scripts" / "tpu_vm.sh"], capture_output=True, text=True, check=False, cwd="/",
        env={**inherited, **environment},
    )  # fmt: skip
    calls = [line for line in log.read_text().splitlines() if " -c " not in line]
    return done.returncode, calls if done.returncode != 2 else [done.stderr]


def test_the_first_run_makes_an_environment_and_the_second_updates_it(checkout: Path):
    assert run(checkout) == (0, [VENV, INSTALL, "tljax doctor"])
    (checkout / ".venv" / "mine").touch()
    assert run(checkout) == (0, [CHECK, INSTALL, "tljax doctor"])
    assert (checkout / ".venv" / "mine").exists()


def test_an_environment_without_pip_is_made_anew(checkout: Path):
    run(checkout)
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert run(checkout) == (0, [VENV, INSTALL, "tljax doctor"])


def test_extras_folder_and_doctor_can_be_chosen(checkout: Path):
    code, calls = run(checkout, EXTRAS="tpu,tfds", VENV="other", NO_DOCTOR="1")
    assert (code, calls[0]) == (0, "stub -m venv --clear other")
    assert calls[1:] == [INSTALL.replace("[tpu]", "[tpu,tfds]")]


def test_problems_and_failures_are_exit_codes(checkout: Path):
    assert run(checkout, PROBLEMS="1")[0] == 1
    assert run(checkout, OFFLINE="3") == (3, [CHECK, INSTALL])


def test_an_old_python_is_one_line(checkout: Path):
    code, (line,) = run(checkout, OLD="1")
    assert code == 2
    assert line.startswith("error: Python 3.11 or later is needed: sudo apt-get install")
    assert not (checkout / ".venv").exists()


def test_shellcheck_finds_nothing():
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if not (shellcheck := shutil.which("shellcheck", path=folders)):
        pytest.skip("needs shellcheck")
    subprocess.run([shellcheck, ROOT / "scripts" / "tpu_vm.sh", ROOT / ".ci" / "run"], check=True)
