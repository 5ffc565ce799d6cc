"""Files of adapters: only what has changed is in them, and only their own base fits them."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from networks import assert_same_variables, difference, random_images, random_pretrained, run

from tljax.models import replace_head
from tljax.models.adapters import add_lora, merge_lora
from tljax.pretrained import Pretrained, export, load_adapter, load_pretrained, save, save_adapter
from tljax.pretrained.formats import read_tensors, write_safetensors
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten, unflatten

KERNELS = ("layer3/block0/conv1/kernel", "layer4/block1/conv2/kernel")


@pytest.fixture(scope="module")
def base() -> Pretrained:
    return random_pretrained("resnet18")


@pytest.fixture(scope="module")
def network(base) -> Pretrained:
    """Return the base with another head, and with factors of LoRA that change it."""
    model, variables = replace_head(base.model, base.variables, 3)
    flat = flatten(add_lora(variables["params"], KERNELS, 4, jax.random.key(0)))
    rng = np.random.default_rng(0)
    changed = [path for path in flat if path.startswith("head/") or "lora_" in path]
    flat |= {path: rng.normal(0, 0.1, flat[path].shape).astype(np.float32) for path in changed}
    card = replace(base.card, classes=("a", "b", "c"))
    return Pretrained(model, {**variables, "params": unflatten(flat)}, card)


@pytest.fixture
def folder(tmp_path, base, network):
    """Write the base, and the adapter as a run does."""
    save(tmp_path / "base.safetensors", base)
    weights = str(tmp_path / "base.safetensors")
    path = tmp_path / "run" / "best" / "adapter.safetensors"
    save_adapter(path, network, base, weights=weights, scale=0.5)
    return tmp_path


def test_a_file_holds_the_factors_and_the_head_alone(folder, network):
    path = folder / "run" / "best" / "adapter.safetensors"
    assert {key.removeprefix("params/") for key in read_tensors(path).arrays} == {
        *("head/kernel", "head/bias"),
        *(kernel.replace("kernel", name) for kernel in KERNELS for name in ("lora_a", "lora_b")),
    }
    assert path.stat().st_size < 300_000 < 10**7 < (folder / "base.safetensors").stat().st_size


@pytest.mark.slow
def test_a_run_is_loaded_merged_or_apart(folder, network):
    merged = load_pretrained(folder / "run")
    params = merge_lora({}, network.variables["params"], scale=0.5)
    assert merged.model == network.model
    assert merged.card == replace(network.card, layout="tljax")
    assert_same_variables(merged.variables, {**network.variables, "params": params})
    apart = load_adapter(folder / "run")
    assert set(flatten(apart.trainable["params"])) == {
        path for path in flatten(network.variables["params"]) if "lora_" in path or "head" in path
    }
    params = apart.materialize(apart.trainable["params"], apart.frozen["params"])
    images = random_images(2, 64, 48)
    variables = {**apart.frozen, "params": params}
    logits = run(apart.model, variables, images).logits
    assert difference(logits, run(*merged[:2], images).logits) < 1e-6
    assert all(isinstance(leaf, np.ndarray) for leaf in flatten(merged.variables).values())


def test_an_export_is_merged(folder):
    merged = load_pretrained(folder / "run")
    export(folder / "merged.pth", merged, "torchvision")
    exported = load_pretrained(folder / "merged.pth")
    assert_same_variables(exported.variables, merged.variables)
    with pytest.raises(RequestError, match="adapts resnet18, not resnet34"):
        load_pretrained(folder / "run", model="resnet34")


def test_biases_norms_and_statistics_are_saved_too(tmp_path, base):
    variables = {kind: dict(flatten(tree)) for kind, tree in base.variables.items()}
    for kind, leaf in (("params", "layer2/block0/conv1/bias"), ("batch_stats", "stem/conv1/mean")):
        variables[kind][leaf] = variables[kind][leaf] + np.float32(1)
    variables = {kind: unflatten(flat) for kind, flat in variables.items()}
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, base._replace(variables=variables), base, weights="x")
    assert set(read_tensors(path).arrays) == {
        *("params/layer2/block0/conv1/bias", "batch_stats/stem/conv1/mean"),
    }
    assert_same_variables(load_adapter(path, base).merged().variables, variables)


def test_a_base_that_moved_is_found_beside_the_adapter(folder):
    expected = load_pretrained(folder / "run")
    moved = folder / "run" / "best" / "base.safetensors"
    (folder / "base.safetensors").rename(moved)
    assert_same_variables(load_pretrained(folder / "run").variables, expected.variables)
    moved.unlink()
    message = r"adapter.safetensors: its base cannot be loaded: .*base.safetensors does not exist"
    with pytest.raises(RequestError, match=message):
        load_pretrained(folder / "run")


def test_another_base_is_refused(folder, base):
    other = random_pretrained("resnet18", seed=1)
    save(folder / "base.safetensors", other)
    with pytest.raises(RequestError, match=f"other weights than .*, of SHA-256 {'0' * 64}"):
        load_pretrained(folder / "run")
    with pytest.raises(RequestError, match="has other weights"):
        load_adapter(folder / "run", random_pretrained("mobilenetv2_050"))
    with pytest.raises(RequestError, match="is no adapter of tljax"):
        load_adapter(folder / "base.safetensors")
    # The head of the base is replaced, so it does not matter.
    model, variables = replace_head(base.model, base.variables, 0)
    backbone = base._replace(model=model, variables=variables)
    assert load_adapter(folder / "run", backbone).model.num_classes == 3


def damaged(path, change):
    tensors = read_tensors(path)
    header = json.loads(tensors.metadata["tljax_adapter"])
    arrays = {key: np.array(value) for key, value in tensors.arrays.items()}
    change(header, arrays)
    write_safetensors(path, arrays, {"tljax_adapter": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.pop("card"), "header of this adapter is damaged"),
        (lambda header, _: header.update(scale="1"), "header of this adapter is damaged"),
        (lambda header, _: header.update(weights=None), "header of this adapter is damaged"),
        (lambda header, _: header["card"].update(task={"kind": "x"}), "header of this adapter is"),
        (lambda header, _: header.update(version=9), "an adapter of version 9.*: upgrade tljax"),
        (lambda header, _: header["model"].pop("stages"), "adapter.safetensors: its description"),
        (lambda _, arrays: arrays.pop("params/head/bias"), "does not fit resnet18: 1 missing"),
        (
            lambda _, arrays: arrays.pop("params/layer3/block0/conv1/lora_b"),
            "does not fit resnet18: 1 missing: params/layer3/block0/conv1/lora_b",
        ),
        (
            lambda _, arrays: arrays.update(
                {"params/layer3/block0/conv1/lora_b": np.zeros((5, 256), np.float32)}
            ),
            r"does not fit resnet18: .*lora_b is \[5, 256\], not \[4, 256\]",
        ),
        (
            lambda _, arrays: arrays["params/head/bias"].fill(np.nan),
            "params/head/bias holds NaN",
        ),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(folder, change, message):
    path = folder / "run" / "best" / "adapter.safetensors"
    damaged(path, change)
    with pytest.raises(RequestError, match=message) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


def test_modules_of_ones_own_are_supplied(tmp_path):
    base = Pretrained(tiny.MODEL, tiny.random_variables(), random_pretrained("resnet18").card)
    base = base._replace(card=replace(base.card, classes=("a", "b", "c")))
    save(tmp_path / "base.safetensors", base)
    adapter = tmp_path / "adapter.safetensors"
    save_adapter(
        adapter,
        base,
        base._replace(variables={"params": {}, "batch_stats": {}}),
        weights=str(tmp_path / "base.safetensors"),
    )
    with pytest.raises(RequestError, match=r"needs the module 'Unit'.*--extension"):
        load_pretrained(adapter)
    loaded = load_pretrained(adapter, modules={"Unit": tiny.Unit})
    assert_same_variables(loaded.variables, base.variables)
