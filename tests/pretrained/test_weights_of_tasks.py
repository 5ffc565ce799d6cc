"""Tasks in files: what a network predicts survives saving, and is read from foreign files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np
import pytest
import torch
from networks import (
    assert_same_variables,
    random_images,
    random_pretrained,
    random_variables,
    run,
    to_torch,
    torch_resnet,
)
from references.keras import randomize
from transformers import AutoModelForImageClassification

from tljax.models import build_model, normalize, with_head
from tljax.pretrained import Pretrained, export, load_pretrained, save
from tljax.pretrained.formats import read_tensors, write_safetensors
from tljax.pretrained.keras_graph import read_graph
from tljax.pretrained.verify import TOLERANCE, verify
from tljax.runtime.errors import RequestError
from tljax.runtime.settings import Kind
from tljax.runtime.task import Task

layers = keras.layers
IMAGES = random_images(3, 65, 64)
FIRST = Path(__file__).with_name("first_version.safetensors")


def small(task: Task, *names: str) -> Pretrained:
    """Return the stem of a MobileNet with a head for a task."""
    loaded = load_pretrained(FIRST)
    model = with_head(loaded.model, task.num_outputs(len(names)))
    card = replace(loaded.card, source="somewhere", classes=names, task=task)
    return Pretrained(model, random_variables(model), card)


def named(task: Task, outputs: int = 3) -> Pretrained:
    """Return a ResNet-18 for a task, as tljax trains it."""
    network = random_pretrained("resnet18", outputs)
    return network._replace(card=replace(network.card, task=task))


def values(pretrained: Pretrained, images: np.ndarray = IMAGES) -> np.ndarray:
    """Return probabilities or numbers."""
    model, variables, card = pretrained
    return card.task.decode(np.asarray(run(model, variables, images).logits))


# --- tljax's own format --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (Task("classification"), ("a", "b")),
        (Task("multilabel"), ("cat", "outdoor")),
        (Task("multilabel", thresholds=(0.0, 0.123456789, 1.0)), ("a", "b", "c")),
        (Task("multilabel", thresholds=(0.25,)), ("rain",)),
        (Task("regression"), ("age",)),
        (Task("regression", mean=(41.5,), scale=(1e-9,), units=("years",)), ("age",)),
        (Task("regression", mean=(-1e9, 0.1), scale=(2.5, 1e30)), ("price", "class 1")),
        (Task("ordinal"), ("bad", "good")),
        (Task("ordinal"), ("class 0", "class 1", "class 2")),
    ],
    ids=lambda x: getattr(x, "kind", "-".join(x) if isinstance(x, tuple) else ""),
)
def test_a_file_of_tljax_preserves_the_task(
    task: Task, names: tuple[str, ...], tmp_path: Path
) -> None:
    """One output is not turned into two classes, and names are not replaced."""
    network = small(task, *names)
    save(tmp_path / "x.safetensors", network)
    loaded = load_pretrained(tmp_path / "x.safetensors").require_classes()
    assert (loaded.model, loaded.card) == (network.model, network.card)
    assert_same_variables(loaded.variables, network.variables)
    assert load_pretrained(tmp_path / "x.safetensors", task=task.kind).card == network.card
    other: Kind = "ordinal" if task.kind != "ordinal" else "classification"
    with pytest.raises(RequestError, match=rf"predicts .*, so its task is not {other}; leave"):
        load_pretrained(tmp_path / "x.safetensors", task=other)


def test_a_file_for_classification_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Byte for byte that of the last version of tljax without tasks."""
    loaded = load_pretrained(FIRST)
    save(tmp_path / "x", loaded._replace(card=replace(loaded.card, source="somewhere")))
    digest = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert digest == "cf809bbed0a684ea4040fd098d32e887368bd4cd1d4f70d5d0c0e7e224f613de"


LABELS = Task("multilabel", thresholds=(0.5, 0.5))
NUMBERS = Task("regression", mean=(1.0, 2.0), scale=(3.0, 4.0), units=("m", "s"))

WRONG: list[tuple[Task, dict[str, Any]]] = [
    *((LABELS, {"thresholds": [0.5, x]}) for x in (-0.1, 1.1, float("nan"), float("inf"))),
    *((LABELS, {"thresholds": [0.5, x]}) for x in ("0.5", None, True, [0.5], {}, 10**400)),
    *((LABELS, {"thresholds": x}) for x in ([0.5], [0.5] * 3, 0.5, None, "ab", {"a": 0.5})),
    *((LABELS, {"kind": x}) for x in ("ranking", "", None, 7, [], ["multilabel"], "x" * 9999)),
    *((LABELS, {"kind": x}) for x in ("classification", "regression", "ordinal")),
    (LABELS, {"mean": [0.0, 0.0]}),
    (LABELS, {"units": ["m", "m"]}),
    *((NUMBERS, {"mean": [1.0, x]}) for x in (float("nan"), float("-inf"), "2", None, -(10**400))),
    *((NUMBERS, {"mean": x}) for x in ([1.0], 1.0, "12", None)),
    *((NUMBERS, {"scale": [1.0, x]}) for x in (0, -1.0, float("nan"), float("inf"), True, "1")),
    *((NUMBERS, {"units": [x, "m"]}) for x in (1, None, ["m"])),
    *((NUMBERS, {"units": x}) for x in (["m"], "ms", 3)),
    (NUMBERS, {"thresholds": [0.5, 0.5]}),
    (NUMBERS, {"color": "blue"}),
]


@pytest.mark.parametrize(("task", "wrong"), WRONG)
def test_a_damaged_task_is_refused(task: Task, wrong: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, small(task, "a", "b"))
    header = json.loads(read_tensors(path).metadata["tljax"])
    header["card"]["task"] |= wrong
    check_damaged(path, header)


@pytest.mark.parametrize("task", [None, [], "multilabel", 3, [["kind", "multilabel"]]])
def test_a_task_that_is_no_object_is_refused(task: object, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, small(LABELS, "a", "b"))
    header = json.loads(read_tensors(path).metadata["tljax"])
    header["card"]["task"] = task
    check_damaged(path, header)


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b", "c")])
@pytest.mark.parametrize("kind", ["multilabel", "regression", "ordinal"])
def test_outputs_that_do_not_fit_the_names_are_refused(
    kind: Any, names: tuple[str, ...], tmp_path: Path
) -> None:
    path, task = tmp_path / "x.safetensors", Task(kind)
    whole = ("a", "b", "c", "d", "e")
    save(path, small(task, *whole))
    header = json.loads(read_tensors(path).metadata["tljax"])
    header["card"]["classes"] = names
    check_damaged(path, header)
    network = small(task, *whole)
    wrong = network._replace(card=replace(network.card, classes=names))
    message = f"{4 if kind == 'ordinal' else 5} outputs for the task {kind} with {len(names)} names"
    with pytest.raises(RequestError, match=f"y is not written: {message}"):
        save(tmp_path / "y", wrong)
    assert not (tmp_path / "y").exists()


def check_damaged(path: Path, header: dict[str, Any]) -> None:
    arrays = {key: np.array(array) for key, array in read_tensors(path).arrays.items()}
    write_safetensors(path, arrays, {"tljax": json.dumps(header)})
    with pytest.raises(RequestError, match=r"its tljax header is damaged \(") as caught:
        load_pretrained(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 350


# --- folders of transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_network() -> Any:
    network = torch_resnet("resnet18", num_classes=3).eval()
    network.config.id2label = {0: "cat", 1: "dog", 2: "outdoor"}
    return network


def torch_outputs(network: Any, pretrained: Pretrained) -> np.ndarray:
    with torch.no_grad():
        pixels = to_torch(normalize(IMAGES, pretrained.model.preprocess))
        return network(pixels).logits.numpy()


@pytest.mark.parametrize(
    ("problem", "task"),
    [
        ("multi_label_classification", Task("multilabel")),
        ("regression", Task("regression")),
        ("single_label_classification", Task()),
        (None, Task()),
    ],
)
def test_the_task_of_a_folder_of_transformers_is_read(
    torch_network: Any, tmp_path: Path, problem: str | None, task: Task
) -> None:
    torch_network.config.problem_type = problem
    torch_network.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path).require_classes()
    assert (loaded.card.task, loaded.card.notes) == (task, ())
    assert loaded.card.classes == ("cat", "dog", "outdoor")
    expected = torch.from_numpy(torch_outputs(torch_network, loaded))
    if task.kind == "multilabel":
        expected = torch.sigmoid(expected)
    elif task.kind == "classification":
        expected = torch.softmax(expected, 1)
    np.testing.assert_allclose(values(loaded), expected, rtol=0, atol=1e-5)
    other: Kind = "ordinal" if task.kind == "regression" else "regression"
    if problem is None:  # what it does not say can be said
        assert load_pretrained(tmp_path, task="multilabel").card.task == Task("multilabel")
    else:
        assert load_pretrained(tmp_path, task=task.kind).card == loaded.card
        with pytest.raises(RequestError, match=r"so its task is not .*; leave it out$"):
            load_pretrained(tmp_path, task=other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "outputs", "problem"),
    [
        (Task(), 3, "single_label_classification"),
        (Task("multilabel", thresholds=(0.1, 0.5, 0.75)), 3, "multi_label_classification"),
        pytest.param(
            *(Task("multilabel"), 3, "multi_label_classification"), marks=pytest.mark.slow
        ),
        (Task("multilabel"), 1, "multi_label_classification"),
        pytest.param(*(Task("regression"), 3, "regression"), marks=pytest.mark.slow),
        (Task("regression", (), (42.0,), (17.5,), ("years",)), 1, "regression"),
        pytest.param(
            *(Task("regression", (), (1e4, -3.0, 0.0), (2e3, 0.01, 1.0)), 3, "regression"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: getattr(x, "kind", ""),
)
def test_transformers_reads_the_exported_task(
    tmp_path: Path, task: Task, outputs: int, problem: str
) -> None:
    """Numbers come in their units: transformers keeps no mean and scale."""
    network = named(task, outputs)
    export(tmp_path, network, "huggingface")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.problem_type == problem
    assert theirs.config.id2label == dict(enumerate(network.card.classes))
    logits = np.asarray(run(network.model, network.variables, IMAGES).logits)
    expected = task.decode(logits) if task.kind == "regression" else logits
    np.testing.assert_allclose(torch_outputs(theirs, network), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "again")
    for folder in (tmp_path, tmp_path / "again"):  # transformers keeps the thresholds and units
        loaded = load_pretrained(folder)
        assert loaded.card.task == replace(task, mean=(), scale=())
        assert (loaded.card.classes, loaded.card.notes) == (network.card.classes, ())
    np.testing.assert_allclose(values(loaded), values(network), rtol=1e-5, atol=1e-5)


def test_ordered_classes_are_not_exported_to_transformers(tmp_path: Path) -> None:
    network = named(Task("ordinal"))
    network = network._replace(card=replace(network.card, classes=tuple("abcd")))
    with pytest.raises(RequestError) as caught:
        export(tmp_path / "x", network, "huggingface")
    assert str(caught.value) == (
        f"transformers has no task for ordered classes, so {tmp_path}/x is not written; export "
        "this network as tljax, stablehlo or onnx"
    )
    assert not list(tmp_path.iterdir())


# --- Keras models ---------------------------------------------------------------------------------

NAME = "tf_mobilenetv2_035"


def with_top(**options: Any) -> Any:
    """Build a network of keras.applications with its original head."""
    model = keras.applications.MobileNetV2(
        input_shape=(64, 64, 3),
        weights=None,  # pyright: ignore[reportArgumentType]
        alpha=0.35,
        classes=5,
        **options,
    )
    randomize(model, ())
    return model


def with_new_head(head: Callable[[Any], Any]) -> Any:
    image = keras.Input((64, 64, 3))
    base = keras.applications.MobileNetV2(
        weights=None,  # pyright: ignore[reportArgumentType]
        include_top=False,
        pooling="avg",
        alpha=0.35,
        input_tensor=image,
    )
    model = keras.Model(image, head(layers.Dropout(0.2)(base.output)))
    randomize(model, ())
    return model


def nested(*head: Any) -> Any:
    base = keras.applications.MobileNetV2(
        input_shape=(64, 64, 3),
        weights=None,  # pyright: ignore[reportArgumentType]
        include_top=False,
        alpha=0.35,
    )
    randomize(base, ())
    image = keras.Input((64, 64, 3))
    x = layers.GlobalAveragePooling2D()(base(image, training=False))
    return keras.Model(image, keras.Sequential(list(head))(x))


HEADS: dict[str, Callable[[], Any]] = {
    "dense": lambda: with_new_head(layers.Dense(5, "sigmoid")),
    "activation": lambda: with_new_head(lambda x: layers.Activation("sigmoid")(layers.Dense(5)(x))),
    "operation": lambda: with_new_head(lambda x: keras.ops.sigmoid(layers.Dense(5)(x))),
    "predictions": lambda: with_top(classifier_activation="sigmoid"),
    "nested": lambda: nested(layers.Dense(5, keras.activations.sigmoid, use_bias=False)),
}
QUICK = {("predictions", "h5")}


@pytest.mark.parametrize(
    ("head", "form"),
    [
        pytest.param(head, form, marks=[] if (head, form) in QUICK else pytest.mark.slow)
        for head in HEADS
        for form in ("keras", "h5")
    ],
)
def test_a_sigmoid_head_of_keras_is_read_as_several_labels(
    head: str, form: str, tmp_path: Path
) -> None:
    model, path = HEADS[head](), tmp_path / f"x.{form}"
    model.save(path)
    loaded = load_pretrained(path).require_classes()
    assert (loaded.model.name, loaded.card.task) == (NAME, Task("multilabel"))
    assert loaded.card.classes == tuple(f"label {i}" for i in range(5))
    assert loaded.card.notes == ()
    images = random_images(3, 64, 64)
    expected = model.predict(np.asarray(normalize(images, loaded.model.preprocess)), verbose=0)
    assert expected.std(0).max() > 0.01  # they depend on the image
    np.testing.assert_allclose(values(loaded, images), expected, rtol=0, atol=1e-5)
    ordered = load_pretrained(path, task="ordinal").card  # cumulative logits end in one too
    assert ordered.classes == tuple(f"class {i}" for i in range(6))
    with pytest.raises(RequestError, match="predicts labels, so its task is not classification"):
        load_pretrained(path, task="classification")
    save(tmp_path / "again.safetensors", loaded)
    assert load_pretrained(tmp_path / "again.safetensors").card.task == Task("multilabel")


@pytest.mark.slow
def test_a_sigmoid_head_of_keras_is_verified(tmp_path: Path) -> None:
    with_top(classifier_activation="sigmoid").save(tmp_path / "x.keras")
    compared = verify(load_pretrained(tmp_path / "x.keras"))
    assert max(layer.difference for layer in compared) <= TOLERANCE


def test_a_sigmoid_head_in_the_form_of_keras_2_is_read(tmp_path: Path) -> None:
    """Keras 2 wrote functions as objects, and the calls of layers as nested lists."""
    model = with_new_head(layers.Dense(5, "sigmoid"))
    model.save(tmp_path / "x.h5")
    graph = json.loads(read_tensors(tmp_path / "x.h5").metadata["keras"])
    head = graph["config"]["layers"][-1]
    [node] = head["inbound_nodes"]
    [tensor] = node["args"]
    head["inbound_nodes"] = [[[*tensor["config"]["keras_history"], {}]]]
    for activation in ("sigmoid", {"class_name": "function", "config": "sigmoid"}):
        head["config"]["activation"] = activation
        built, _, kinds = read_graph(json.dumps(graph), "x.h5", build_model(NAME, 5))
        assert (built.num_classes, kinds) == (5, ("multilabel", "ordinal"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (layers.Dense(5, "hard_sigmoid"), "is hard_sigmoid, but"),
        (layers.Dense(5, "log_sigmoid"), "is log_sigmoid, but"),
        (layers.Dense(5, "tanh"), "is tanh, but"),
        (lambda x: keras.ops.sigmoid(layers.Dense(5, "sigmoid")(x)), "is sigmoid, but"),
        (keras.ops.sigmoid, "its features end in a sigmoid"),
        (layers.Softmax(), "its features end in a softmax"),
    ],
)
def test_other_activations_of_a_keras_head_are_refused(
    head: Any, message: str, tmp_path: Path
) -> None:
    with_new_head(head).save(tmp_path / "x.keras")
    with pytest.raises(RequestError, match=message):
        load_pretrained(tmp_path / "x.keras")


def test_a_keras_head_without_activation_can_be_given_a_task(tmp_path: Path) -> None:
    path = tmp_path / "x.keras"
    with_new_head(layers.Dense(1)).save(path)
    loaded = load_pretrained(path)
    assert (loaded.card.task, loaded.card.classes) == (Task(), ("class 0", "class 1"))
    assert loaded.card.notes == (
        (
            f"{path}: its last layer has no activation, so its outputs are read as logits of "
            "classes; `tljax weights import --task` chooses another"
        ),
        f"{path}: its single output is read as the sigmoid logit of 'class 1'",
    )
    number = load_pretrained(path, task="regression")
    assert (number.card.task, number.card.classes) == (Task("regression"), ("number 0",))
    assert number.model.num_classes == 1


# --- files that say nothing -----------------------------------------------------------------------


def test_a_file_of_tensors_takes_the_task_that_is_given(tmp_path: Path) -> None:
    network, path = random_pretrained("resnet18", 3), tmp_path / "x.pth"
    export(path, network, "torchvision")
    assert load_pretrained(path).card.task == Task()
    names_by_task: tuple[tuple[Kind, tuple[str, ...]], ...] = (
        ("classification", ("class 0", "class 1", "class 2")),
        ("multilabel", ("label 0", "label 1", "label 2")),
        ("regression", ("number 0", "number 1", "number 2")),
        ("ordinal", ("class 0", "class 1", "class 2", "class 3")),
    )
    for task, names in names_by_task:
        loaded = load_pretrained(path, task=task).require_classes()
        assert (loaded.card.task, loaded.card.classes) == (Task(task), names)
        assert_same_variables(loaded.variables, network.variables)
    with pytest.raises(RequestError, match="no task 'labels'; choose from classification, multi"):
        load_pretrained(path, task="labels")  # pyright: ignore[reportArgumentType]


def test_exported_tensors_give_numbers_in_their_units(tmp_path: Path) -> None:
    task = Task("regression", mean=(1e3, 0.0, 5.0), scale=(2.5, 1.0, 1e-3))
    network, path = named(task), tmp_path / "x.pth"
    before = values(network)
    export(path, network, "torchvision")
    np.testing.assert_allclose(
        values(load_pretrained(path, task="regression")), before, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(values(network), before)  # the network is not changed


def test_a_backbone_has_no_task(tmp_path: Path) -> None:
    export(tmp_path / "x.pth", random_pretrained("resnet18", 0), "torchvision")
    with pytest.raises(RequestError, match="predicts features, so its task is not multilabel; le"):
        load_pretrained(tmp_path / "x.pth", task="multilabel")


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "one", "many"),
    [
        ("classification", "class", "classes"),
        ("multilabel", "label", "labels"),
        ("regression", "number", "numbers"),
        ("ordinal", "class", "ordered classes"),
    ],
)
def test_messages_speak_of_what_the_network_predicts(kind: Any, one: str, many: str) -> None:
    network = small(Task(kind), "age", "mass", "Age", "MASS")
    with pytest.raises(RequestError, match=f"^no {one} is called 'ago' among 4; did you mean age"):
        network.card.index_of("ago")
    with pytest.raises(RequestError, match=f"^2 {many} are called 'AGE'; use 0 or 2"):
        network.card.index_of("AGE")
    assert network.card.index_of("MASS") == 3
    assert network.require_classes() is network
    for other in get_args(Kind):
        if other == kind:
            assert network.require_task(other) is network
            continue
        with pytest.raises(RequestError, match=f"^somewhere predicts {many}, but this needs a net"):
            network.require_task(other)
    unnamed = network._replace(card=replace(network.card, classes=("age",)))
    message = "outputs but 1 class names: it is not" if kind == "classification" else f"1 {one} na"
    with pytest.raises(RequestError, match=message):
        unnamed.require_classes()
    backbone = small(Task(kind))
    with pytest.raises(RequestError, match=f"a backbone without a head, so it has no {many}; add"):
        backbone.require_classes()
