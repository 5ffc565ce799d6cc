"""Images of one, two, four and thirteen channels from the command line: train to export."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from networks import random_pretrained
from PIL import Image
from test_scripts import answer, call_script, messages

from tljax.commands.cli import Channels
from tljax.data.examples import Source
from tljax.models.inputs import adapt_kernel
from tljax.pretrained import Pretrained, load_pretrained, save
from tljax.runtime.errors import RequestError
from tljax.runtime.preprocess import CAFFE_PREPROCESS, Preprocess

FORMS = {1: "PNG of 16 bits", 2: "PNG", 4: "PNG", 13: "npy"}


@pytest.fixture(scope="module")
def network() -> Pretrained:
    return random_pretrained("mobilenetv2_050", 3)


def images(channels: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return images of two classes, a dark and a bright one, and the classes."""
    rng = np.random.default_rng(channels)
    labels = np.arange(count, dtype=np.int32) % 2
    values = rng.uniform(0, 0.3, (count, 40, 36, channels)).astype(np.float32)
    values += 0.5 * labels[:, None, None, None].astype(np.float32)
    return values, labels


@pytest.fixture(scope="module", params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of a number of channels into folders of classes."""
    channels, folder = request.param, tmp_path_factory.mktemp("bands") / str(request.param)
    for i, (values, label) in enumerate(zip(*images(channels), strict=True)):
        (folder / f"kind {label}").mkdir(parents=True, exist_ok=True)
        path = folder / f"kind {label}" / f"{i:02d}"
        if FORMS[channels] == "npy":
            np.save(path.with_suffix(".npy"), 3 * values - 1)
        elif FORMS[channels] == "PNG":
            Image.fromarray((255 * values).astype(np.uint8)).save(path.with_suffix(".png"))
        else:
            Image.fromarray((65535 * values[..., 0]).astype(np.uint16)).save(f"{path}.png")
    return folder


@pytest.mark.slow
def test_images_of_any_channels_from_training_to_the_export(
    cache: Path, folder: Path, tmp_path: Path, network: Pretrained
):
    channels, workdir = int(folder.name), tmp_path / "run"
    save(tmp_path / "start.safetensors", network)
    start = ("--weights", tmp_path / "start.safetensors", "--image-size", 32)
    data = ("--data", folder, "--channels", channels)
    done = call_script(
        cache, "train", *data, *start, "--workdir", workdir, "--epochs", 1, "--augment",
        "--batch-size", 8, "--json",
    )  # fmt: skip
    assert answer(done)["val_top1"] > 0.7
    dtype = "uint8" if channels in (2, 4) else "float32"
    bits = "8 bits" if dtype == "uint8" else "more than 8 bits"
    assert f"{channels} channel{'s' * (channels > 1)} of {bits}; measured mean " in done.stderr
    assert (workdir / "report.html").stat().st_size > 20_000
    trained = load_pretrained(workdir)
    preprocess = trained.model.preprocess
    assert (preprocess.channels, preprocess.dtype) == (channels, dtype)

    probed = answer(call_script(cache, "probe", *data, *start, "--json"))
    assert probed["val_top1"] > 0.7
    own = ("--weights", workdir)
    predicted = answer(call_script(cache, "predict", folder / "kind 1", *own, "--json"))
    assert len(predicted["images"]) == 20
    assert not predicted["skipped"]
    assert answer(call_script(cache, "evaluate", *own, "--data", folder, "--json"))["top1"] > 0.7

    arguments = ("--attacks", "fgsm", "--epsilons", 8, "--count", 4, "--out", tmp_path / "pictures")
    attacked = call_script(cache, "attack", *own, "--data", folder, *arguments, "--json")
    if channels == 13:  # its numbers are from -1 to 2
        assert attacked.returncode == 2
        assert "images must be finite and within the bounds 0 to 1" in attacked.stderr
    else:
        assert answer(attacked)["examples"] == 4
        assert np.asarray(Image.open(tmp_path / "pictures" / "grid.png")).shape[2] == 3

    image = next((folder / "kind 0").iterdir())
    explained = call_script(cache, "visualize", "explain", image, *own, "--out", tmp_path / "why")
    assert explained.returncode == 0, explained.stderr
    ideal = call_script(cache, "visualize", "ideal", *own, "--out", tmp_path / "ideal")
    (line,) = messages(ideal.stderr)[-1:]
    assert f"images are drawn in RGB of 8 bits: mobilenetv2_050 takes {channels} channels" in line
    program = tmp_path / "program"
    exported = call_script(cache, "weights", "export", workdir, program, "--layout", "stablehlo")
    assert exported.returncode == 0, exported.stderr
    described = json.loads((program / "model.json").read_text())["preprocess"]
    assert (described["channels"], described["dtype"]) == (channels, dtype)
    assert not (program / "predict.py").exists()


def source(values: np.ndarray, labels: np.ndarray) -> Source:
    return Source(values, labels, ("kind 0", "kind 1"), [f"image {i}" for i in range(len(labels))])


@pytest.mark.slow
def test_an_adapter_holds_the_first_kernel_of_other_channels(
    cache: Path, tmp_path: Path, network: Pretrained
):
    for i, (values, label) in enumerate(zip(*images(2), strict=True)):
        (tmp_path / "data" / f"kind {label}").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "data" / f"kind {label}" / f"{i:02d}.npy", values)
    save(tmp_path / "start.safetensors", network)
    command = (
        *("train", "--data", tmp_path / "data", "--channels", 2, "--adapter", "lora"),
        *("--weights", tmp_path / "start.safetensors", "--image-size", 32, "--epochs", 1),
        *("--workdir", tmp_path / "run", "--batch-size", 8, "--json"),
    )
    trained = answer(call_script(cache, *command))
    measured = answer(call_script(cache, "evaluate", "--workdir", tmp_path / "run", "--json"))
    assert measured["top1"] == pytest.approx(trained["val_top1"])
    assert load_pretrained(tmp_path / "run").model.preprocess.channels == 2


@pytest.mark.parametrize("channels", FORMS)
def test_the_first_kernel_and_the_statistics_follow_the_channels(
    channels: int, network: Pretrained, capsys: pytest.CaptureFixture[str]
):
    values, labels = images(channels)
    adapted = Channels(channels=channels).adapt(network, source(values, labels))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {channels} channel{'s' * (channels > 1)} of more than 8 bits; m")
    preprocess = adapted.model.preprocess
    np.testing.assert_allclose(preprocess.mean, values.mean((0, 1, 2)), atol=0.02)
    assert preprocess.resize == network.model.preprocess.resize
    old, new = (n.variables["params"]["stem"]["conv"]["kernel"] for n in (network, adapted))
    np.testing.assert_array_equal(new, adapt_kernel(old, channels))


def test_a_mean_and_deviation_that_are_given_are_taken(
    network: Pretrained, capsys: pytest.CaptureFixture[str]
):
    given = Channels(channels=2, mean=(0.25, -0.5), std=(0.5, 2.0))
    adapted = given.adapt(network, source(*images(2)))
    assert "2 channels of more than 8 bits; given mean 0.25 -0.5, dev" in capsys.readouterr().err
    assert adapted.model.preprocess.mean == (0.25, -0.5)
    assert adapted.model.preprocess.std == (0.5, 2)


def test_without_the_option_a_network_stays_as_it_is(network: Pretrained):
    assert Channels().adapt(network, source(*images(3))) is network


def test_a_network_of_caffe_becomes_one_of_rgb(network: Pretrained):
    caffe = replace(network.model, preprocess=replace(CAFFE_PREPROCESS, size=32, resize=32))
    values, labels = images(3)
    adapted = Channels(channels=3).adapt(network._replace(model=caffe), source(values, labels))
    assert adapted.model.preprocess.channel_order == "rgb"
    old, new = (n.variables["params"]["stem"]["conv"]["kernel"] for n in (network, adapted))
    scale = np.asarray(Preprocess().std)[:, None] * 255
    np.testing.assert_allclose(new, old[:, :, ::-1] * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, "--std has 0 numbers for 2 channels: give --mean and --std, one n"),
        ({"mean": (0.5,), "std": (1.0,)}, "--mean has 1 numbers for 2 channels: give --mean and"),
        ({"mean": (1e6, 0), "std": (1, 1)}, "the mean or deviation of a channel is a million or"),
    ],
)
def test_a_mean_that_does_not_fit_the_channels_is_refused(
    network: Pretrained, options: dict[str, tuple[float, ...]], message: str
):
    with pytest.raises(RequestError) as error:
        Channels(channels=2, **options).adapt(network, source(*images(2)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mean", "0.5", "0.5"), "--mean 0.5 0.5 has no effect without --channels"),
        (("--channels", "0"), "--channels 0: choose a whole number from 1 to 1,024"),
        (("--channels", "2"), "digit 0000: it has 3 channels instead of 2"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    cache: Path, tmp_path: Path, network: Pretrained, words: tuple[str, ...], message: str
):
    save(tmp_path / "start.safetensors", network)
    weights = ("--weights", tmp_path / "start.safetensors")
    done = call_script(cache, "train", "--data", "digits", *weights, *words)
    assert done.returncode == 2
    assert message in messages(done.stderr)[-1]
