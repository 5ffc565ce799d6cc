"""Where files go."""

from pathlib import Path

import pytest

from tljax import files


def test_compiled_programs_are_kept_for_one_kind_of_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    found = []
    for machine in ("x86_64", "aarch64", "x86_64"):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setattr(files.platform, "machine", lambda machine=machine: machine)
        files.keep_compiled()
        found.append(Path(files.os.environ["JAX_COMPILATION_CACHE_DIR"]))
    assert found[0] == found[2] != found[1]
    assert {path.parent for path in found} == {tmp_path / "compiled"}


@pytest.mark.parametrize("chosen", ["", "/elsewhere"])
def test_another_choice_wins(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    files.keep_compiled()
    assert files.os.environ["JAX_COMPILATION_CACHE_DIR"] == chosen
