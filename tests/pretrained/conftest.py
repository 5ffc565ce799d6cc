"""A fixture of the tests that verify networks."""

import pytest


@pytest.fixture
def one_small_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify networks on images of one small size, for which they compile fast."""
    monkeypatch.setattr("tljax.pretrained.verify.INPUTS", ((2, 65, 49, 3),))
