"""What is kept on the disk of the stages that stay, and what is left when it cannot be."""

import shutil
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from engine import LOADING, source

import tljax.transfer.features as features_module
from tljax.errors import RequestError
from tljax.transfer.features import compute_features

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    return tmp_path / "features"


def kept(tiny, **how):
    return compute_features(
        *tiny, source(10, broken=(3,)), LOADING, stop="layer1", cache=True, **how
    )


def test_bfloat16_comes_back_as_it_was(tiny, folder):
    first = kept(tiny, dtype="bfloat16")
    again = kept(tiny, dtype="bfloat16")
    exact = kept(tiny)
    assert len(list(folder.iterdir())) == 2
    assert first.values.dtype == again.values.dtype == ml_dtypes.bfloat16
    assert isinstance(again.values, np.memmap)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(again.values, exact.values.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(again.indices, exact.indices)


def test_no_room_is_one_line(tiny, folder, monkeypatch):
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * 16 * 16 * 8 * 4 - 1))
    with pytest.raises(RequestError, match=r"GiB and .* free: set TLJAX_CACHE to another disk$"):
        kept(tiny)
    assert not folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10 * 16 * 16 * 8 * 4))
    kept(tiny)


def test_nothing_half_written_stays(tiny, folder, monkeypatch):
    compute = features_module._forward_source

    def failing(*args):
        yield from list(compute(*args))[:2]
        raise RuntimeError("in the middle")

    monkeypatch.setattr(features_module, "_forward_source", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        kept(tiny)
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line(tiny, folder, monkeypatch):
    compute = features_module._forward_source

    def failing(*args):
        yield next(compute(*args))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module, "_forward_source", failing)
    with pytest.raises(RequestError, match=r"cannot be written .No space left on device"):
        kept(tiny)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tiny, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", "/dev/null/cache")
    with pytest.raises(RequestError, match=r"cannot be written .Not a directory"):
        kept(tiny)
