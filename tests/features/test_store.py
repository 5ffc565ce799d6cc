"""The cache of features: its keys, its limit, and several processes that use it at once."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn

import tljax
from tljax.data.examples import Source
from tljax.data.options import Loading
from tljax.features import store
from tljax.features.extract import compute_features
from tljax.models import MODELS, Stage
from tljax.runtime.errors import RequestError

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# One of each family, and of each kind of activation that is a field.
FAMILIES = (
    *("resnet18", "resnext50_32x4d", "resnet18d", "keras_resnet50v2", "resnetv2_50x1_bit"),
    *("inception_v3", "keras_xception", "efficientnet_lite0", "vgg16_bn", "mobilenetv1_100"),
    *("mobilenetv2_100", "mobilenetv3_small_100", "tf_mobilenetv3_large_100"),
    *("efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv4_conv_small"),
)

PRINT_KEYS = """
import sys
from tljax.models import MODELS
from tljax.features import store
for name in sys.argv[1:]:
    print(name, store.entry_folder(MODELS[name](num_classes=2), {}, "head", ("source", None)).name)
"""


def keys(models, seed, root=Path(tljax.__file__).parents[1]):
    """Compute cache keys, without weights, in another process."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT_KEYS, *models],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_every_network_has_the_same_cache_key_in_every_process():
    first = keys(FAMILIES, "1")
    assert first == keys(FAMILIES, "2")
    assert len(set(first.values())) == len(FAMILIES)
    # Also in this process, which has imported and compiled other things.
    model = MODELS["efficientnet_lite0"](num_classes=2)
    key = store.entry_folder(model, {}, "head", ("source", None)).name
    assert key == first["efficientnet_lite0"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Copy the package and read the files of the copy."""
    root = Path(tljax.__file__).parent
    shutil.copytree(root, tmp_path / "tljax", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(tljax, "__file__", str(tmp_path / "tljax" / "__init__.py"))
    yield tmp_path / "tljax"
    monkeypatch.undo()
    clear_caches()


def clear_caches():
    """Clear what a process computes once."""
    store._code.cache_clear()
    store._file_digest.cache_clear()


def test_changed_code_changes_the_cache_key(package):
    clear_caches()
    cache_keys = [key_of()]
    for file in ("models/layers.py", "data/decode.py", "data/augment.py"):
        with (package / file).open("a") as source:
            source.write("#")
        clear_caches()
        cache_keys.append(key_of())
    assert len(set(cache_keys)) == 4
    (package / "report" / "page.py").write_text("")
    clear_caches()
    assert key_of() == cache_keys[-1]


def twice(x):
    return 2 * x


class Activation(nn.Module):
    function: object = nn.relu
    rates: object = (1, 2)

    def __call__(self, x, _train):
        return self.function(x)


def key_of(**settings):
    stages = (Stage("stem", Activation(**settings)), *tiny.MODEL.stages[1:])
    return store.entry_folder(replace(tiny.MODEL, stages=stages), {}, "layer1", ()).name


def test_the_settings_of_a_stage_are_part_of_the_cache_key():
    functions = nn.relu, jax.nn.relu6, nn.hard_swish, twice, np.tanh
    partials = partial(twice), partial(nn.leaky_relu, negative_slope=0.1), partial(nn.leaky_relu)
    settings = [{"function": function} for function in (*functions, *partials)]
    settings += [{"rates": (1, 3)}, {"rates": {"a": 1}}, {"rates": {"a": 2}}, {"rates": "(1, 2)"}]
    cache_keys = [key_of(**each) for each in settings]
    assert len(set(cache_keys)) == len(settings)
    assert cache_keys == [key_of(**each) for each in settings]


@pytest.mark.parametrize("unnamed", [lambda x: x, object(), np.ones(2)])
def test_settings_that_cannot_be_described_get_a_unique_cache_key(unnamed):
    assert key_of(rates=unnamed) != key_of(rates=unnamed)


def test_the_file_of_a_custom_stage_is_part_of_the_cache_key(monkeypatch, tmp_path):
    before = key_of()
    edited = tmp_path / "edited.py"
    edited.write_text(Path(__file__).read_text("utf-8") + "#", "utf-8")
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(edited))
    assert key_of() != before


def source(count):
    images = np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % 2
    return Source(list(images), labels, ("a", "b"), [str(i) for i in range(count)])


@pytest.fixture
def compute(tmp_path, monkeypatch):
    """Compute the features of a number of images, cached in an empty folder."""
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    variables = tiny.random_variables()

    def compute(count):
        loading = Loading(batch_size=4)
        stop = "layer1"
        return compute_features(
            tiny.MODEL, variables, source(count), loading, stop=stop, cache=True
        )

    return compute


def test_the_least_recently_used_entries_are_evicted(compute, tmp_path, monkeypatch, capsys):
    each = 8 * 16 * 16 * 4
    folders = {}
    for age, count in enumerate((4, 5, 6)):
        known = set((tmp_path / "features").glob("*"))
        compute(count)
        (folders[count],) = set((tmp_path / "features").glob("*")) - known
        os.utime(folders[count] / "about.json", (1000 + age,) * 2)
        assert f"cached in {folders[count]}" in capsys.readouterr().err
    compute(4)  # marks the entry as used
    assert f"features  4 images  from {folders[4]}" in capsys.readouterr().err
    monkeypatch.setenv("TLJAX_FEATURE_CACHE_GIB", str((4 + 6 + 7 + 1) * each / 2**30))
    compute(7)
    assert [count for count, folder in folders.items() if folder.exists()] == [4, 6]
    compute(8)
    assert not any(folder.exists() for count, folder in folders.items() if count != 4)


def test_features_over_the_limit_are_refused_and_evict_nothing(compute, tmp_path, monkeypatch):
    compute(4)
    monkeypatch.setenv("TLJAX_FEATURE_CACHE_GIB", "0.00001")
    with pytest.raises(RequestError, match=r"raise TLJAX_FEATURE_CACHE_GIB$"):
        compute(5)
    assert len(list((tmp_path / "features").iterdir())) == 1
    monkeypatch.setenv("TLJAX_FEATURE_CACHE_GIB", "much")
    with pytest.raises(RequestError, match="TLJAX_FEATURE_CACHE_GIB=much: choose a number of GiB"):
        compute(5)


SWEEP = """
import os, sys, traceback
from pathlib import Path
import numpy as np
from tljax.features import store

features, rounds = Path(sys.argv[1], "features"), int(sys.argv[2])

def sweep():
    for _ in range(rounds):
        for key in range(4):
            expected = np.full((64, 1000), key, np.float32)
            stored = store.read(features / str(key))
            if stored is None:
                batches = (
                    (expected[first : first + 8], np.arange(first, first + 8))
                    for first in range(0, 64, 8)
                )
                stored = store.write(features / str(key), batches, expected.nbytes, {3: "cut"})
            np.testing.assert_array_equal(stored[0], expected)
            assert stored[1].tolist() == list(range(64))
            assert stored[2] == {3: "cut"}

for entries in (10, 2.5):
    os.environ["TLJAX_FEATURE_CACHE_GIB"] = str(entries * (64 * 1000 * 4 + 500) / 2**30)
    for _ in range(4):
        if os.fork() == 0:
            try:
                sweep()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    assert [os.wait()[1] for _ in range(4)] == 4 * [0]
    print(*sorted(path.name.partition("-")[0] for path in features.glob("*/*")))
"""


def test_four_processes_share_one_cache(tmp_path):
    """Run four processes at once, first with space for all entries, then for about half of them."""
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path), "15"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TLJAX_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split() == 4 * ["about.json"] + 4 * ["values"]
    assert set(second.split()) == {"about.json", "values"}


def test_the_second_of_two_writers_returns_the_entry_of_the_first(compute, tmp_path, monkeypatch):
    made = []
    write = store._write_values

    def while_another_is_quicker(path, *args):
        about = write(path, *args)
        if not made:
            made.append(path)
            compute(4)
        return about

    monkeypatch.setattr(store, "_write_values", while_another_is_quicker)
    features = compute(4)
    (folder,) = (tmp_path / "features").iterdir()
    left = {path.name for path in folder.iterdir()}
    about = json.loads((folder / "about.json").read_text())
    assert left == {"about.json", about[0]}
    assert Path(features.values.filename).name == about[0]
    assert not made[0].exists()


def test_an_entry_evicted_while_it_is_mapped_stays_readable(compute, tmp_path, monkeypatch):
    features = compute(4)
    expected = np.array(features.values)
    monkeypatch.setenv("TLJAX_FEATURE_CACHE_GIB", str(6.5 * 8 * 16 * 16 * 4 / 2**30))
    compute(6)
    assert len(list((tmp_path / "features").iterdir())) == 1
    np.testing.assert_array_equal(features.values, expected)


def test_a_disk_that_returns_other_bytes_is_one_line(compute, tmp_path, monkeypatch):
    write = store._write_values

    def damaged(path, *args):
        about = write(path, *args)
        with path.open("r+b") as file:
            file.write(b"other")
        return about

    monkeypatch.setattr(store, "_write_values", damaged)
    with pytest.raises(RequestError, match=r"bytes read differ .*: set TLJAX_CACHE"):
        compute(4)
    assert list((tmp_path / "features").iterdir()) == []
