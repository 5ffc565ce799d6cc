"""Features of a whole source, their cache, and the recipes that use them."""

import json
import os
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

import tljax.features.extract as features_module
from tljax.data.examples import Source, Splits
from tljax.data.options import Loading
from tljax.features import store
from tljax.features.evaluate import evaluate
from tljax.features.extract import (
    Outputs,
    compute_features,
    feature_bytes,
    over_source,
    run_from_stage,
)
from tljax.models import apply
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten
from tljax.train.fit import fit
from tljax.train.options import FitConfig, OptimizerConfig
from tljax.train.recipes import default_freeze_to

pytestmark = pytest.mark.usefixtures("quick_to_compile")

LOADING = Loading(batch_size=4)


def source(count=10, seed=0, broken=()):
    """Create gray squares with noise, light for class 1 and dark for class 0."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 2
    images = rng.integers(0, 90, (count, 16, 16, 3)) + 160 * labels[:, None, None, None]
    examples = [b"broken" if i in broken else x.astype(np.uint8) for i, x in enumerate(images)]
    return Source(examples, labels, ("dark", "light"), [f"image {i}" for i in range(count)])


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Use an empty cache, and record each call that computes features."""
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    compute, calls = features_module.over_source, []

    def counting(*args):
        calls.append(args)
        return compute(*args)

    monkeypatch.setattr(features_module, "over_source", counting)
    return tmp_path, calls


def test_abandoned_files_are_removed_after_a_day(tiny, cached):
    model, variables = tiny
    folder = cached[0] / "features"
    first = compute_features(model, variables, source(seed=1), LOADING, cache=True)
    (old,) = folder.iterdir()
    entry_files = {path.name for path in old.iterdir()}
    for path in old.iterdir():
        os.utime(path, (time.time() - 90_000,) * 2)
    for name, age in (
        ("values-1.bin", 90_000),
        ("values-2.bin", 0),
        (".about.json.3.part", 90_000),
    ):
        (old / name).write_bytes(b"half")
        os.utime(old / name, (time.time() - age,) * 2)
    for abandoned in (folder / ".part-of-the-first-version", folder / "empty"):
        abandoned.mkdir()
    (folder / ".part-of-the-first-version" / "values.bin").touch()
    os.utime(folder / ".part-of-the-first-version" / "values.bin", (time.time() - 90_000,) * 2)
    compute_features(model, variables, source(), LOADING, cache=True)
    assert {path.name for path in old.iterdir()} == {*entry_files, "values-2.bin"}
    assert len(list(folder.iterdir())) == 2
    again = compute_features(model, variables, source(seed=1), LOADING, cache=True)
    np.testing.assert_array_equal(first.values, again.values)
    assert len(cached[1]) == 2


def test_a_cache_entry_of_the_first_version_is_ignored_and_evicted(tiny, cached, monkeypatch):
    model, variables = tiny
    first = cached[0] / "features" / "1f"
    first.mkdir(parents=True)
    for name in ("values.bin", "about.json", "sha256"):
        (first / name).write_text('[[1], "uint8", [0], []]')
    assert store.read(first) is None
    compute_features(model, variables, source(), LOADING, cache=True)
    assert len(list(first.iterdir())) == 3
    for path in first.iterdir():
        os.utime(path, (time.time() - 90_000,) * 2)
    monkeypatch.setenv(
        "TLJAX_FEATURE_CACHE_GIB", str((feature_bytes(model, 10, "head") + 1) / 2**30)
    )
    compute_features(model, variables, source(seed=1), LOADING, cache=True)
    assert not first.exists()


def test_features_equal_the_output_of_apply_for_any_batch_size(tiny):
    model, variables = tiny
    data = source(10)
    images = np.stack([data.read(i) for i in range(10)])
    for stop in ("layer1", "head", None):
        expected = apply(model, variables, images, stop=stop).value
        for size in (3, 16):
            features = compute_features(model, variables, data, Loading(size), stop=stop)
            np.testing.assert_allclose(features.values, expected, rtol=1e-5, atol=1e-6)
            assert features.indices.tolist() == list(range(10))
            assert features.labels.tolist() == data.labels.tolist()


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (3, [4]), (16, [16]), (17, [16, 16])])
def test_few_images_are_loaded_in_a_small_batch(tiny, count, rows):
    model, variables = tiny
    seen = []

    def forward(_, batch):
        seen.append(len(batch.mask))
        return jax.numpy.asarray(batch.targets)

    loading = Loading(16, devices=1)
    parts = over_source(forward, variables, source(count), model.preprocess, loading, {})
    assert np.concatenate([indices for _, indices in parts]).tolist() == list(range(count))
    assert seen == rows


def test_advance_equals_running_all_stages_at_once(tiny):
    model, variables = tiny
    whole = compute_features(model, variables, source(), LOADING, stop=None)
    prefix = compute_features(model, variables, source(), LOADING, stop="layer1")
    onward = run_from_stage(model, variables, prefix, LOADING, start="layer1")
    np.testing.assert_allclose(onward.values, whole.values, rtol=1e-5, atol=1e-6)
    assert prefix.values.nbytes == feature_bytes(model, 10, "layer1")


def test_unreadable_images_are_left_out_and_named(tiny):
    model, variables = tiny
    features = compute_features(model, variables, source(10, broken=(2, 9)), LOADING)
    assert features.indices.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert sorted(features.skipped) == [2, 9]
    with pytest.raises(RequestError, match="image 2"):
        compute_features(
            model, variables, source(10, broken=(2,)), replace(LOADING, on_bad_image="fail")
        )


def test_the_cache_is_keyed_by_content(tiny, cached, monkeypatch):
    model, variables = tiny
    _, calls = cached

    def run(model=model, variables=variables, data=None, **options):
        compute_features(model, variables, data or source(), LOADING, cache=True, **options)
        return len(calls)

    assert run() == 1
    assert run() == 1, "the same again"
    assert run(data=source(seed=1)) == 2, "other images"
    assert run(stop="pool") == 3, "another stage"
    preprocess = replace(model.preprocess, mean=(0.1, 0.2, 0.3))
    assert run(replace(model, preprocess=preprocess)) == 4, "another normalization"
    head = {**variables, "params": {**variables["params"], "head": variables["params"]["head"]}}
    head["params"]["head"] = jax.tree.map(lambda x: x + 1, head["params"]["head"])
    assert run(variables=head) == 4, "the head is not part of the features"
    stem = jax.tree.map(lambda x: x, variables)
    stem["batch_stats"]["stem"] = jax.tree.map(lambda x: x + 1e-6, stem["batch_stats"]["stem"])
    assert run(variables=stem) == 5, "one statistic moved"
    assert run(variables=stem, dtype="bfloat16") == 6, "stored in half precision"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert run(variables=stem) == 7, "another device"


def test_a_damaged_cache_file_is_found_and_replaced(tiny, cached):
    model, variables = tiny
    folder, calls = cached
    data = source(10, broken=(3,))
    first = compute_features(model, variables, data, LOADING, cache=True)
    (entry,) = (folder / "features").iterdir()
    expected = np.array(first.values)
    damages = 0
    about = entry / "about.json"
    for values in (True, False):
        for position in (0, 0.3, 0.6, 0.9):
            file = entry / json.loads(about.read_text())[0] if values else about
            good = file.read_bytes()
            offset = int(position * len(good))
            file.unlink()  # the memory map of the old file stays valid
            file.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
            again = compute_features(model, variables, data, LOADING, cache=True)
            np.testing.assert_array_equal(again.values, expected)
            damages += 1
            assert len(calls) == 1 + damages
        if values:
            assert len(list(entry.iterdir())) == 2
    (entry / json.loads(about.read_text())[0]).unlink()
    compute_features(model, variables, data, LOADING, cache=True)
    assert len(calls) == 10
    entry = compute_features(model, variables, data, LOADING, cache=True)
    assert len(calls) == 10
    assert entry.skipped == first.skipped
    assert entry.labels.tolist() == first.labels.tolist()


def test_pooling_averages_positions_and_leaves_vectors():
    maps = np.arange(2 * 3 * 3 * 4, dtype=np.float32).reshape(2, 3, 3, 4)
    labels = np.zeros(2, np.int32)
    np.testing.assert_allclose(
        Outputs(maps, labels, labels, {}).pooled().values, maps.reshape(2, 9, 4).mean(1)
    )
    np.testing.assert_array_equal(
        Outputs(maps[:, 0, 0], labels, labels, {}).pooled().values, maps[:, 0, 0]
    )


def test_evaluate_counts_correct_and_wrong_predictions():
    logits = np.array([[3.0, 1, 0], [0, 2, 1], [5, 0, 0], [0, 0, 9]], np.float32)
    labels = np.array([0, 1, 2, 1], np.int32)
    evaluation = evaluate(Outputs(logits, labels, np.array([7, 8, 9, 10]), {}))
    assert evaluation.top1 == 0.5
    assert evaluation.top5 == 1.0
    np.testing.assert_array_equal(evaluation.confusion, [[1, 0, 0], [0, 1, 1], [1, 0, 0]])
    assert evaluation.worst(5).tolist() == [3, 2]  # by confidence
    assert evaluation.indices[evaluation.worst(1)].tolist() == [10]


CONFIG = FitConfig(epochs=3, optimizer=OptimizerConfig(learning_rate=1e-2))
OPTIONS = {"loading": LOADING}


@pytest.fixture
def splits():
    return Splits(source(21, broken=(4,)), source(9, seed=1), ())


@pytest.mark.slow
def test_fine_tuning_starts_at_the_probe_and_keeps_the_best(tiny, splits):
    model, variables = tiny
    before = {path: np.array(leaf) for path, leaf in flatten(variables).items()}
    logged = []
    result = fit(
        model,
        variables,
        splits,
        replace(CONFIG, freeze_to="stem"),
        **OPTIONS,
        on_epoch=logged.append,
    )
    assert [entry["phase"] for entry in result.history] == ["probe"] + 3 * ["train"]
    assert [len(history) for history in logged] == [1, 2, 3, 4]
    assert logged[-1] == result.history
    json.dumps(logged)
    assert result.evaluation.top1 == max(entry["val_top1"] for entry in result.history)
    assert result.model.num_classes == 2
    assert sorted(result.skipped[0]) == [4]
    after = flatten(result.variables)
    for path, leaf in before.items():
        if "/stem/" in path or path.startswith("batch_stats"):
            np.testing.assert_array_equal(after[path], leaf, strict=True)
    # The caller's variables are unchanged.
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(leaf, before[path], strict=True)


def test_the_returned_network_has_the_returned_evaluation(tiny, splits):
    model, variables = tiny
    result = fit(model, variables, splits, CONFIG, **OPTIONS)
    again = evaluate(
        compute_features(result.model, result.variables, splits.val, LOADING, stop=None)
    )
    assert again.top1 == result.evaluation.top1
    assert again.loss == pytest.approx(result.evaluation.loss, rel=1e-4)


def test_the_same_seed_gives_the_same_bytes(tiny, splits):
    model, variables = tiny
    one, two = (fit(model, variables, splits, CONFIG, **OPTIONS) for _ in range(2))
    assert one.history == two.history
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)


def test_the_probe_recipe_changes_only_the_head(tiny, splits):
    model, variables = tiny
    result = fit(model, variables, splits, replace(CONFIG, recipe="probe"), **OPTIONS)
    assert len(result.history) == 1
    moved = [
        path
        for path, leaf in flatten(result.variables).items()
        if not np.array_equal(leaf, flatten(variables)[path])
    ]
    assert sorted(moved) == ["params/head/bias", "params/head/kernel"]


def test_the_default_frozen_part_ends_before_the_lowest_resolution():
    from tljax.models import build_model

    assert default_freeze_to(build_model("resnet18")) == "layer3"
    assert default_freeze_to(build_model("efficientnet_lite0")) == "stage5"
    assert default_freeze_to(build_model("vit_tiny_patch16_224")) == "block10"


def test_data_that_cannot_be_trained_on_is_refused(tiny, splits):
    model, variables = tiny
    with pytest.raises(RequestError, match="no stage 'layer7'"):
        fit(model, variables, splits, replace(CONFIG, freeze_to="layer7"), **OPTIONS)
    unreadable = splits._replace(train=source(4, broken=(1, 3)))
    with pytest.raises(RequestError, match="no image of class 'light' in the training data"):
        fit(model, variables, unreadable, CONFIG, **OPTIONS)
    unreadable = splits._replace(val=source(2, broken=(0, 1)))
    with pytest.raises(RequestError, match="no image of the validation data"):
        fit(model, variables, unreadable, CONFIG, **OPTIONS)
