"""--extension: a Python file of the user, which is run and hashed."""

import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from networks import random_pretrained
from test_scripts import answer, call_script, paint

from tljax.commands import cli
from tljax.commands.extension import Extension, load_extension
from tljax.pretrained import save
from tljax.runtime.errors import RequestError
from tljax.runtime.files import CONFIG_VERSION

GOOD = """
from dataclasses import dataclass

@dataclass
class Mine:
    size: "int" = 3

def objective(forward, batch, key):
    return Mine().size

extension = {"objective": objective, "modules": {"Mine": Mine}}
other = dict(on_step=print)
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_is_run_once_and_nothing_is_written(tmp_path):
    path = write(tmp_path / "mine.py", GOOD)
    found, digest = load_extension(str(path))
    assert list(found) == ["objective", "modules"]
    assert found["objective"](None, None, None) == 3
    again, same = load_extension(f"{path}:other")
    assert (again, same) == ({"on_step": print}, digest)
    assert load_extension(f"{path}:extension")[0]["modules"]["Mine"] is found["modules"]["Mine"]
    assert [*tmp_path.iterdir()] == [path]
    assert not [name for name in sys.modules if name == "mine"]
    path.write_text(GOOD.replace("= 3", "= 4"))
    found, changed = load_extension(str(path))
    assert found["objective"](None, None, None) == 4
    assert changed != digest


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nine.py", "", "--extension: {tmp}/nine.py does not exist; did you mean {tmp}/mine.py?"),
        ("", "", "--extension: {tmp}/ cannot be read: Is a directory"),
        (
            "mine.py:b",
            "a = {}",
            "{tmp}/mine.py: it has no 'b': define one, or name another by FI",
        ),
        ("mine.py", "extension = 3", "{tmp}/mine.py: 'extension' is not a dict: define one, or"),
        ("mine.py", "\n1 / 0", "{tmp}/mine.py, line 2: ZeroDivisionError: division by zero"),
        ("mine.py", "x = 1\ndef f(:", "{tmp}/mine.py, line 2: SyntaxError: invalid syntax"),
        ("mine.py", "import nosuch", "{tmp}/mine.py, line 1: ModuleNotFoundError: No module named"),
        ("mine.py", "exit(3)", "{tmp}/mine.py, line 1: SystemExit: 3"),
        ("mine.py", "extension = dict(objectiv=1)", "an unknown key 'objectiv'; did you mean obj"),
        ("mine.py", "extension = dict(xy=1)", "an unknown key 'xy'; choose from objective, mater"),
        (
            "mine.py",
            "extension = dict(on_step=1)",
            "{tmp}/mine.py: 'on_step' of extension is not a f",
        ),
        (
            "mine.py",
            "extension = dict(modules=1)",
            "{tmp}/mine.py: 'modules' of extension is not a d",
        ),
    ],
)
def test_an_error_in_an_extension_is_one_line(tmp_path, name, text, said):
    write(tmp_path / "mine.py", text)
    before = set(sys.modules)
    with pytest.raises(RequestError) as error:
        load_extension(f"{tmp_path}/{name}")
    assert said.format(tmp=tmp_path) in str(error.value)
    assert not [new for new in set(sys.modules) - before if "extension_" in new and "line" in said]


def test_commands_pass_the_modules_of_an_extension_to_load_pretrained(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.py", GOOD)
    handed = []
    monkeypatch.setattr(
        "tljax.pretrained.load_pretrained", lambda *_, **k: handed.append(k) or 1 / 0
    )
    for config in (cli.Network(extension=str(path)), cli.Network(extension=f"{path}:other")):
        with pytest.raises(ZeroDivisionError):
            config.load()
    assert [one.pop("modules") and "Mine" for one in handed] == ["Mine", None]
    assert handed[0] == handed[1]
    assert cli.Network().hooks() == {}


def test_the_keys_of_an_extension_are_arguments_of_fit_and_modules():
    assert set(Extension.__annotations__) == {
        *("objective", "materialize", "transform", "on_step", "on_epoch", "new_head", "modules")
    }


HALVED = """
import optax
transform = optax.scale({scale})
extension = {{"transform": transform}}
same = {{"transform": transform}}
"""


def options(place: Path) -> tuple[object, ...]:
    """Return the options of a training of seconds."""
    save(place / "net.safetensors", random_pretrained("mobilenetv2_050", 5))
    for i in range(8):
        paint(place / "data" / "ab"[i % 2] / f"{i}.png", (200 * (i % 2), 60, 60), i)
    return (
        "train", "--data", place / "data", "--weights", place / "net.safetensors", "--image-size",
        "32", "--epochs", "2", "--recipe", "finetune", "--train", "head", "--batch-size", "4",
        "--optimizer", "sgd", "--weight-decay", "0", "--json",
    )  # fmt: skip


def test_training_passes_the_hooks_of_an_extension_to_fit_and_nothing_else(tmp_path, monkeypatch):
    path, train = write(tmp_path / "mine.py", GOOD.replace('"Mine": Mine', "")), options(tmp_path)
    given, identities = [], []

    def fit(*_, **options):
        given.append(options)
        raise RequestError("seen")

    def checkpoints(_, identity, *_hooks):
        identities.append(identity)
        return Mock()

    monkeypatch.setattr("tljax.train.fit.fit", fit)
    monkeypatch.setattr("tljax.train.checkpoint.Checkpoints", checkpoints)
    runs = ((), ("--log-every", "5"), ("--extension", path), ("--extension", f"{path}:other"))
    for number, more in enumerate(runs):
        done = call_script(tmp_path, *train, "--workdir", tmp_path / f"run{number}", *more)
        assert done.stderr.splitlines()[-1] == "error: seen"
    plain, *others = given
    added = [{k: v for k, v in one.items() if k not in plain} for one in others]
    assert [one["log_every"] for one in given] == [1, 5, 1, 1]
    assert list(added[0]) == ["on_step"]  # which writes the lines
    assert list(added[1]) == ["objective"]
    assert added[2] == {"on_step": print}
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3
    assert all(load_extension(str(path))[1] in identity for identity in identities[2:])


@pytest.mark.slow
def test_a_run_keeps_its_extension_and_refuses_another(tmp_path):
    code = write(tmp_path / "mine.py", HALVED.format(scale=0.0))
    train = options(tmp_path)
    for run, more in (("plain", ()), ("still", ("--extension", "mine.py"))):
        answer(call_script(tmp_path, *train, "--workdir", tmp_path / run, *more))
    plain, still = (
        [json.loads(line)["val_loss"] for line in lines.read_text().splitlines()]
        for lines in (tmp_path / "plain/metrics.jsonl", tmp_path / "still/metrics.jsonl")
    )
    assert len(set(plain)) == 3
    assert len(set(still)) == 1  # a gradient times 0 moves nothing
    path = tmp_path / "still" / "config.json"
    config = json.loads(path.read_text())
    assert config["version"] == CONFIG_VERSION
    assert config["extension"] == f"{code}:extension"
    assert config["fingerprint"]["extension"] == load_extension(str(code))[1]
    assert (
        "extension" not in json.loads((tmp_path / "plain/config.json").read_text())["fingerprint"]
    )

    answer(call_script(tmp_path, "train", "--resume", tmp_path / "still", "--json"))
    resume = ("train", "--resume", tmp_path / "still")
    for more, said in (
        (("--extension", "mine.py:same"), "continues with its own options: leave out --extension"),
        (("--extension", "other.py"), "--extension: other.py does not exist"),
    ):
        done = call_script(tmp_path, *resume, *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    done = call_script(tmp_path, "train", "--resume", tmp_path / "plain", "--extension", code)
    assert f"leave out --extension {code}" in done.stderr

    moved = code.rename(tmp_path / "moved.py")
    assert "does not exist" in call_script(tmp_path, *resume).stderr
    answer(call_script(tmp_path, *resume, "--extension", moved, "--json"))
    assert json.loads(path.read_text()) == {**config, "extension": f"{moved}:extension"}
    write(moved, HALVED.format(scale=1.0))
    done = call_script(tmp_path, *resume)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'still'}: the functions of the extension {moved}:extension have "
        "changed: restore them or start a new run"
    )


def test_a_run_of_an_earlier_version_predicts_and_cannot_be_continued(tmp_path):
    save(tmp_path / "run/best/model.safetensors", random_pretrained("mobilenetv2_050", 5))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": "x", "average": 0.5}))
    for flag in ("--resume", "--workdir"):
        done = call_script(tmp_path, "train", flag, tmp_path / "run")
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "config.json: only an earlier version of tljax can continue" in line
    paint(tmp_path / "x.png", (200, 60, 60), 1)
    options = ("--weights", tmp_path / "run", "--image-size", "32", "--json")
    assert (
        len(answer(call_script(tmp_path, "predict", tmp_path / "x.png", *options))["images"]) == 1
    )


WEIGHTED = """
def objective(forward, batch, key):
    return batch.extra["weight"], {}

extension = {"objective": objective}
"""


def test_an_error_in_an_extension_has_its_line(tmp_path):
    path, train = write(tmp_path / "mine.py", WEIGHTED), options(tmp_path)
    done = call_script(tmp_path, *train, "--workdir", tmp_path / "run", "--extension", path)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == f"error: {path}, line 3: KeyError: 'weight'"


@pytest.mark.slow
def test_after_an_error_in_an_extension_the_folder_can_be_used_again(tmp_path):
    path, train = write(tmp_path / "mine.py", WEIGHTED), options(tmp_path)
    again = (*train, "--workdir", tmp_path / "run", "--extension", path)
    assert call_script(tmp_path, *again).returncode == 2
    loss = "forward(batch.inputs).logits.sum(1) ** 2"
    path.write_text(WEIGHTED.replace('batch.extra["weight"]', loss))
    answer(call_script(tmp_path, *again))
    path.write_text(path.read_text() + "# another\n")
    assert "start a new run" in call_script(tmp_path, *again).stderr
