"""Every option of every command: it has an effect, or is refused in one line with the reason.

`ALWAYS` lists the options that always have an effect; all others are in the conditions of their
command. A new option must be added to one of them.
"""

import inspect
import json
import re
import sys
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import import_module
from itertools import product
from math import inf, nan
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints
from unittest import mock

import numpy as np
import pytest
import tyro
from test_scripts import messages

from tljax.commands import COMMANDS, cli
from tljax.data.options import AugmentConfig, Loading
from tljax.runtime.errors import RequestError
from tljax.runtime.files import CONFIG_VERSION
from tljax.runtime.ranges import Range, ranges
from tljax.runtime.settings import find_unused_settings, settings
from tljax.studies.robustness import ATTACKS
from tljax.train.options import AdversaryConfig, FitConfig, OptimizerConfig

MODULES = {name: import_module(f"tljax.commands.{name}") for name in COMMANDS}
PARSED = {name: get_type_hints(module.run) for name, module in MODULES.items()}
PARSED = {name: next(iter(hints.values())) for name, hints in PARSED.items()}

OUTPUT = {"json", "debug", "platform"}
NETWORK = {*OUTPUT, "extension", "model", "normalization", "image_size", "precision", "seed"}
DATA = {"batch_size", "workers", "devices"}
RUNS = {*DATA, "distributed"}
LABELS = {"root", "target", "task", "group", "path_column", "split_column", "weight_column"}
ALWAYS = {
    "attack Config": {
        *(NETWORK | RUNS | {"head"}),
        *("images", "workdir", "count", "attacks", "epsilons", "norm", "target", "out"),
    },
    "compare Config": {
        *(OUTPUT | DATA | LABELS),
        *("extension", "weights", "data", "image_size", "seed", "out", "channels"),
    },
    "doctor Config": OUTPUT,
    "evaluate Config": {*(NETWORK | RUNS), "data", "workdir", "head"},
    "extract Config": {*(NETWORK | RUNS | LABELS), "weights", "data", "out", "stage", "maps"},
    "pack Config": {*OUTPUT, "data", "out", "verify"},
    "predict Config": {*(NETWORK | DATA), "weights", "images", "top", "out", "head"},
    "probe Config": {
        *(NETWORK | RUNS | LABELS),
        *("weights", "data", "stage", "neighbors", "channels"),
    },
    # A dry run speaks of the command as it stands, so nothing but another mode is idle in it.
    "train Config": {
        *(NETWORK | DATA | LABELS),
        *("weights", "data", "workdir", "resume", "recipe", "head_after"),
        *("on_bad_image", "dry_run", "distributed", "balance", "channels"),
    },
    "visualize Channel": {*NETWORK, "weights", "out", "channels", "stage", "steps"},
    "visualize Dream": {*NETWORK, "weights", "out", "images", "stage", "steps"},
    "visualize Explain": {*NETWORK, "weights", "out", "images", "target"},
    "visualize Features": {*NETWORK, "weights", "out", "images", "count"},
    "visualize Ideal": {*NETWORK, "weights", "out", "classes", "steps", "tv_weight"},
    "weights Export": {*OUTPUT, "extension", "weights", "path", "model", "layout"},
    "weights Import": {*OUTPUT, "extension", "weights", "path", "model", "normalization", "task"},
    "weights List": {*OUTPUT, "name"},
    "weights Verify": {*OUTPUT, "extension", "weights", "model", "reference"},
}
# A rehearsal has the options of its command, and is for all chips of the machine.
ALWAYS |= {
    f"rehearse {name.capitalize()}": {*ALWAYS[f"{name} Config"], "on", "effort", "largest_batch"}
    - {"devices", "distributed", "resume", "dry_run"}
    for name in ("train", "probe", "attack", "evaluate", "extract")
}

COMMANDS = {
    f"{name} {command.__name__}": command
    for name, parsed in PARSED.items()
    for command in (get_args(parsed) or (parsed,))
}


def defaults(command: type) -> object:
    """Return a command with default options, and "x" for those that are required."""
    needed = [one.name for one in fields(command) if one.default is one.default_factory is MISSING]
    return command(**dict.fromkeys(needed, "x"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own, which shows what a command writes."""
    monkeypatch.chdir(tmp_path)


def refused(capsys, script: str, *arguments: object) -> str:
    """Return the one line of a command that is refused and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    argv = [script, *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as ended:
        cli.main(PARSED[script], MODULES[script].run)
    assert ended.value.code == 2
    assert sorted(Path.cwd().rglob("*")) == before
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = messages(err)
    return line


def line_of(command: str, *arguments: object) -> list[str]:
    """Return the command, its subcommand and required arguments, then further ones."""
    script, _, name = command.partition(" ")
    parsed = COMMANDS[command]
    words = [] if name == "Config" else [name.lower()]
    needed = [one for one in fields(parsed) if one.default is one.default_factory is MISSING]
    for one in needed:
        words += ["x"] if get_origin(one.type) is Annotated else [f"--{one.name}", "x"]
    return [script, *words, *map(str, arguments)]


# --- numbers --------------------------------------------------------------------------------------


def numbers(hint: object) -> int:
    """Return the number of numbers in a type."""
    return (hint in (int, float)) + sum(map(numbers, get_args(hint)))


def numeric(command: type) -> dict[str, list[tuple[type, Range]]]:
    """Return the options that hold numbers, and the ranges of their numbers."""
    found = {}
    for one in fields(command):
        nested = next((x for x in (one.type, *get_args(one.type)) if is_dataclass(x)), None)
        if nested:
            found |= numeric(nested)
        elif numbers(one.type):
            found[one.name] = ranges(one.type)
            assert len(found[one.name]) == numbers(one.type), f"{one.name} needs a range"
    return found


# Those of a rehearsal are the numbers of its command.
@pytest.mark.parametrize("name", [name for name in COMMANDS if "rehearse" not in name])
def test_numbers_out_of_range_are_refused(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for option, found in numeric(COMMANDS[name]).items():
        flag = f"--{option.replace('_', '-')}"
        (kind, allowed), *others = found
        below = allowed.low if allowed.without == "low" else allowed.low - 1
        above = allowed.high if allowed.without == "high" else 2 * allowed.high
        for number in (below, above if kind is int else "nan"):
            values = (number, *(rest.low + 0.5 for _, rest in others))
            positional = name == "visualize Channel" and option == "channels"
            said = refused(capsys, *line_of(name, *[flag][positional:], *values))
            assert said.startswith(f"error: {flag} {number}"), said
            assert said.endswith(f"number {allowed}")


def test_ranges_include_or_exclude_their_ends_as_printed():
    assert str(Range(1, 10_000)) == "from 1 to 10,000"
    assert str(Range(0, 1, without="high")) == "from 0 to below 1"
    assert str(Range(0, 3e38, without="low")) == "above 0, up to 3e+38"
    ends = [Range(0, 1, without).holds(end) for without in (None, "low", "high") for end in (0, 1)]
    assert ends == [True, True, False, True, True, False]
    assert not any(Range(-3e38, 3e38).holds(number) for number in (nan, inf, -inf, "1", None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FitConfig(epochs=0), "--epochs 0: choose a whole number from 1 to 1,000,000,000"),
        (lambda: FitConfig(epochs=2.5), "--epochs 2.5: choose a whole number"),
        (lambda: FitConfig(patience="3"), "--patience 3: choose a whole number"),
        (lambda: FitConfig(layer_decay=0), "--layer-decay 0: choose a number above 0, up to 1"),
        (lambda: OptimizerConfig(learning_rate=nan), "--learning-rate nan: choose a number from 0"),
        (lambda: OptimizerConfig(weight_decay=-1), "--weight-decay -1: choose a number from 0"),
        (lambda: AdversaryConfig(epsilon=256), "--epsilon 256: choose a number above 0, up to 255"),
        (lambda: AugmentConfig(scale=(0.2, 1.5)), "--scale 0.2 1.5: choose a number above 0"),
        (
            lambda: AugmentConfig(scale=(0.9, 0.2)),
            "--scale 0.9 0.2: the first number must not be above",
        ),
        (lambda: AugmentConfig(ratio=(0.9, 0.95)), "--ratio 0.9 0.95: choose a number from 1"),
        (lambda: Loading(batch_size=0), "--batch-size 0: choose a whole number from 1"),
        (lambda: Loading(workers=-1), "--workers -1: choose a whole number from 0"),
    ],
)
def test_options_in_python_have_the_same_ranges(make, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        make()
    assert Loading(np.int64(8), devices=None).batch_size == 8


# --- wrong command lines --------------------------------------------------------------------------

OF_PARSER = ["--sedd 1", "--seed", "--seed x", "--image-size 1.5", "--precision float16"]
WRONG = {
    "train Config": [
        "--epoch 3", "--epochs", "--epochs x", "--recipe prob", "animals", "--scale 1",
        "--data nowhere", "--resume nowhere", "--distributed", "--weights nowhere.pth",
        "--val-fraction 1",
    ],
    "predict Config": ["", "nowhere.jpg", ". --top 2.5", "x --tpo 2", "--devices two", *OF_PARSER],
    "pack Config": [
        "", "y", "y z", "y --size 3", "y --size x", "y --size", "y --format png", "y --formt raw",
        "y --workers -1", "y --interpolation nearest", "y --val-fraction 1", "y --verify",
        "--verify", "y --weights z",
    ],
    "doctor Config": [
        "all", "--all", "--jsn", "--json yes", "--model x", "--platform", "--platform x",
        "--platform gpu cpu", "--debug=1", "-x", "--weights",
    ],
    "evaluate Config": [
        "", "--data nowhere", "--workdir nowhere", "--batch-size many", "--data digits digits",
        *OF_PARSER,
    ],
    "probe Config": [
        "--data nowhere", "--nieghbors 3", "--neighbors 1.5", "--val-fraction all", "folder",
        *OF_PARSER,
    ],
    "compare Config": [
        "--model resnet50", "--data nowhere", "--out", "--sead 1", "--seed x", "--workers none",
        "--image-size 1.5", "--batch-size", "--device 1", "--precision x",
    ],
    "attack Config": [
        "", "nowhere.jpg", "x --norm l3", "x --epsilon 4", "x --epsilons four", "x --steps",
        *OF_PARSER,
    ],
    "extract Config": [
        "--stge x", "--stage", "--maps=1", "--top 3", "y", "--batch-size two", "--out", *OF_PARSER,
    ],
    "rehearse Train": [
        "--on v5e", "--effort high", "--effort", "--epoch 3", "--on", "--largest-batch=1", "x",
        "--recipe prob", "--devices 2", "--dry-run", "--weights nowhere.pth",
    ],
    "visualize Channel": ["one", "0.5", "0 --step 3", "--steps x", "--stage", *OF_PARSER],
    "visualize Dream": ["--stages x", "--steps", "--steps x", "--out", "--tv 1", *OF_PARSER],
    "visualize Explain": ["", "--targt x", "--target", "--steps 3", "--out", *OF_PARSER],
    "visualize Features": ["", "--count x", "--count", "--counts 3", "--stage x", *OF_PARSER],
    "visualize Ideal": ["--step 3", "--steps", "--tv-weight x", "--tv 1", "--out", *OF_PARSER],
    "weights Export": [
        "", "x.pth y.pth", "x.pth --layuot timm", "x.pth --layout", "x.pth --model",
        "--precision x", "x.pth --normalization tf", "x.pth --seed", "x.pth --json=1",
        "x.pth --out y",
    ],
    "weights Import": [
        "", "x y z", "y --modle resnet18", "y --model", "y --normalization imagenet",
        "y --layout x", "y --normalization", "y --weights x", "y --json=1", "y.pth --path x",
    ],
    "weights List": [
        "no-such-name", "--all", "--jsn", "--json yes", "--model x", "--out x", "--debug=1", "x y",
        "-x", "--weights",
    ],
    "weights Verify": [
        "y", "--refrence x", "--reference", "--model", "--modle x", "--json=1", "--layout x",
        "--out", "y z", "--image-size 3",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "lines"), WRONG.items())
def test_a_wrong_command_line_is_one_line_and_nothing_is_written(
    capsys, tmp_path, monkeypatch, name, lines
):
    assert len(lines) >= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "9")
    for line in lines:
        assert len(refused(capsys, *line_of(name, *line.split())).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --epoch 3", "unrecognized options: --epoch, 3; did you mean --epochs?"),
        ("train --scale 1", "missing value for argument '--scale'. Expected 2 values;"),
        ("train --recipe prob", "invalid choice 'prob' for argument '--recipe'. Expected one of ("),
        ("predict --top 1.5", "--top: invalid literal for int() with base 10: '1.5'; --help lists"),
        ("weights lst", "unrecognized options: lst; did you mean list, verify, import, export?"),
        ("weights", "expected one of {list, verify, import, export}; --help lists them all"),
        ("weights export x", "missing from weights export: PATH; --help lists them all"),
    ],
)
def test_an_error_in_a_command_line_is_described(capsys, line, said):
    assert refused(capsys, *line.split()).startswith(f"error: {said}")


@pytest.mark.parametrize("words", [["predict", ""], ["train", "--data", ""], ["train", "--data="]])
def test_an_empty_argument_is_refused(capsys, words):
    assert refused(capsys, *words).startswith("error: an argument is empty")


def test_a_value_may_end_with_an_equals_sign(capsys):
    assert refused(capsys, "predict", "https://[=").startswith("error: could not fetch https://[=")


def setting(flag: str) -> str:
    return flag.removeprefix("no-").replace("-", "_")


def written(flag: str, values: tuple[object, ...]) -> str:
    return " ".join(map(str, (f"--{flag}", *values)))


def test_every_option_always_has_an_effect_or_has_a_condition():
    assert COMMANDS.keys() == ALWAYS.keys()
    for name, command in COMMANDS.items():
        flags = settings(defaults(command)).keys()
        conditional = {flag for names, *_ in command.conditions for flag in names.split()}
        assert ALWAYS[name] | conditional == flags, name
        assert not ALWAYS[name] & conditional, name


# For every conditional flag of every command: arguments with which it has no effect, and why not.
AUGMENTATION = {
    "crop": ("center",),
    "scale": (0.2, 0.9),
    "ratio": (0.8, 1.2),
    "no-flip": (),
    "mixup": (0.4,),
    "cutmix": (1.0,),
    "randaugment-layers": (2,),
    "randaugment-magnitude": (5.0,),
}
LORA = {
    "rank": (4,),
    "alpha": (8.0,),
    "adapter-dropout": (0.1,),
    "adapter-targets": ("stage7", "*/expand/*"),
}
OF_STEPS = {
    "freeze-to": ("stage5",),
    "train": ("head", "stage7"),
    "rates": ("head=2",),
    "layer-decay": (0.8,),
    "epochs": (3,),
    "batch-norm": ("batch",),
    "dropout": (0.2,),
    "drop-path": (0.2,),
    "label-smoothing": (0.1,),
    "class-weights": ("balanced",),
    "ema-decay": (0.9,),
    "patience": (2,),
    "accumulate": (2,),
    "remat": (),
    "fsdp": (),
    "frozen-dtype": ("bfloat16",),
    "cache-views": (4,),
    "optimizer": ("sgd",),
    "learning-rate": (0.01,),
    "momentum": (0.5,),
    "weight-decay": (0.1,),
    "schedule": ("step",),
    "warmup": (0.2,),
    "clip-norm": (0.5,),
    "augment": (),
    "attack": ("fast",),
    "epsilon": (8.0,),
    "attack-steps": (3,),
    "loss": ("focal",),
    "focal-gamma": (1.0,),
    "choose-by": ("loss",),
    "adapter": ("lora",),
    **LORA,
    **AUGMENTATION,
}
BIT = {
    "optimizer": ("adamw",),
    "weight-decay": (0.1,),
    "schedule": ("cosine",),
    "mixup": (0.1,),
    "warmup": (0.1,),
    "clip-norm": (1.0,),
    "crop": ("center",),
    "scale": (0.2, 0.9),
    "ratio": (0.8, 1.2),
}
FIND = {
    "epochs": (3,),
    "learning-rate": (0.1,),
    "schedule": ("step",),
    "warmup": (0.2,),
    "patience": (2,),
    "ema-decay": (0.9,),
    "checkpoint-minutes": (5.0,),
    "log-every": (10,),
    "profile": (),
    "pack": ("always",),
    "verify-content": (),
    "choose-by": ("loss",),
    "interpolate": ("0:1:0.5",),
    "interpolate-data": ("digits",),
}
LABELS_OF_DATA = {
    "root": ("x",),
    "target": ("a,b",),
    "task": ("multilabel",),
    "order": ("a,b",),
    "units": ("m",),
    "group": ("patient",),
    "path-column": ("x",),
    "split-column": ("x",),
    "weight-column": ("x",),
}
BFLOAT16 = {"cache-dtype": ("bfloat16",)}
IDLE = [
    (
        "train", "--recipe probe", "with --recipe probe",
        {**OF_STEPS, "checkpoint-minutes": (5.0,), "log-every": (10,)},
    ),
    ("train", "", "without --augment", {**AUGMENTATION, "cache-views": (4,)}),
    ("train", "--recipe bit", "HyperRule", BIT),
    ("train", "--recipe bit", "they augment", {"no-augment": ()}),
    ("train", "--recipe scratch", "they augment", {"no-augment": ()}),
    ("train", "--find-learning-rate", "with --find-learning-rate", FIND),
    (
        "train", "--dry-run", "with --dry-run",
        {
            "find-learning-rate": (), "profile": (), "pack": ("always",),
            "interpolate": ("0:1:0.5",), "interpolate-data": ("digits",),
        },
    ),
    ("train", "--recipe finetune", "do not start from", {"interpolate": ("0:1:0.5",)}),
    ("train", "--attack fast", "robust accuracy is compared", {"interpolate": ("0:1:0.5",)}),
    ("train", "", "without --interpolate", {"interpolate-data": ("digits",)}),
    (
        "train", "--augment --crop center", "without --crop random-resized",
        {"scale": (0.2, 0.9), "ratio": (0.8, 1.2)},
    ),
    ("train", "--augment", "without --randaugment-layers", {"randaugment-magnitude": (5.0,)}),
    ("train", "", "without --loss focal", {"focal-gamma": (1.0,)}),
    ("train", "--attack fast", "robust accuracy is compared", {"choose-by": ("loss",)}),
    *(
        (script, options, "with another --task than", {flag: (value,)})
        for script, required in (
            ("train", ""), ("probe", ""), ("compare", ""),
            ("evaluate", "--data x"), ("extract", "x --out x.npz"), ("pack", "x y"),
        )
        for flag, value, task in (("order", "a,b", "multilabel"), ("units", "m", "ordinal"))
        for options in [f"{required} --task {task}"]
    ),
    ("evaluate", "--workdir run", "without --data", LABELS_OF_DATA),
    (
        "pack", "x --verify", "with --verify",
        {
            "size": (128,), "interpolation": ("bicubic",), "format": ("jpeg",), "workers": (2,),
            "val-fraction": (0.3,), **LABELS_OF_DATA,
        },
    ),
    (
        "rehearse", "train --on v5e-8", "in a rehearsal",
        {
            "devices": (2,), "distributed": (), "resume": ("x",), "dry-run": (),
            "find-learning-rate": (), "profile": (),
        },
    ),
    ("pack", "parts y", "a validation part of its own", {"val-fraction": (0.3,)}),
    ("train", "--data packed:x", "on images that are packed", {"pack": ("auto",)}),
    ("train", "--distributed --workdir x", "use tljax pack on each host", {"pack": ("always",)}),
    ("train", "", "without --adapter lora", LORA),
    ("train", "--adapter norm", "without --adapter lora", LORA),
    ("train", "", "without --attack", {"epsilon": (8.0,), "attack-steps": (3,)}),
    ("train", "--attack fast", "without --attack pgd", {"attack-steps": (3,)}),
    ("train", "--optimizer adam", "without --optimizer sgd", {"momentum": (0.5,)}),
    ("train", "--optimizer lamb", "without --optimizer sgd", {"momentum": (0.5,)}),
    ("train", "", "without --optimizer sgd", {"momentum": (0.9,)}),  # a default, but given
    ("train", "--schedule one-cycle", "with --schedule one-cycle", {"warmup": (0.2,)}),
    ("train", "", "where a head is fitted", {"head": ("x.npz",)}),
    ("train", "--recipe scratch", "where a head is fitted", {"head": ("x.npz",)}),
    (
        "train", "--recipe finetune --augment", "where nothing is frozen",
        {"frozen-dtype": ("bfloat16",), "cache": ("disk",), "cache-views": (4,), **BFLOAT16},
    ),
    ("train", "--recipe scratch", "where nothing is frozen", {"cache": ("memory",), **BFLOAT16}),
    (
        "train", "--recipe finetune --rates stem=0.5", "where nothing is frozen",
        {"cache": ("disk",)},
    ),
    ("train", "--augment --cache none", "--cache none", {"cache-views": (4,), **BFLOAT16}),
    ("train", "--attack fast", "with --attack: nothing is cached", BFLOAT16),
    ("train", "--augment", "without --cache-views", BFLOAT16),
    ("train", "--data parts", "a validation part of its own", {"val-fraction": (0.3,)}),
    ("probe", "--data parts", "a validation part of its own", {"val-fraction": (0.3,)}),
    ("compare", "--data parts", "a validation part of its own", {"val-fraction": (0.3,)}),
    *(
        (script, "", "without --channels", {"mean": (-0.5, 0.5), "std": (0.2, 0.3)})
        for script in ("train", "probe", "compare")
    ),
    ("evaluate", "--workdir run", "with --workdir", {"weights": ("y",)}),
    ("attack", "--workdir run", "with --workdir", {"weights": ("y",)}),
    ("attack", "x.jpg", "with images", {"data": ("digits",)}),
    (
        "attack", "x.jpg", "without --data",
        {"columns": ("a",), "root": ("b",), "path-column": ("c",), "split-column": ("d",)},
    ),
    ("attack", "x.jpg", "without --out", {"pictures": (3,)}),
    ("attack", "x.jpg --attacks fgsm", "with --attacks fgsm", {"steps": (3,)}),
]  # fmt: skip


@pytest.mark.parametrize(("script", "others", "why", "flags"), IDLE)
def test_options_without_effect_are_refused(
    capsys, tmp_path, monkeypatch, script, others, why, flags
):
    for part, name in product(("train", "val"), "ab"):
        (tmp_path / "parts" / part / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = " ".join(written(flag, values) for flag, values in flags.items())
    said = refused(capsys, script, *others.split(), *given.split()).removeprefix("error: ")
    lines = {line.partition(" has no effect ")[::2] for line in said.split("; ")}
    assert {flag for flag, _ in lines} == {written(*flag) for flag in flags.items()}
    assert all(why in reason for _, reason in lines)


def test_every_condition_is_tested():
    """A row of a table of conditions without a test fails here."""
    tried = {(script, setting(flag)) for script, _, _, flags in IDLE for flag in flags}
    for name, command in COMMANDS.items():
        script, *_, subcommand = name.lower().split()
        for names, *_ in command.conditions:
            untried = {flag for flag in names.split() if (script, flag) not in tried}
            # A rehearsal has the conditions of its command.
            rehearsed = {flag for flag in untried if (subcommand, flag) in tried}
            assert untried == (rehearsed if script == "rehearse" else set()), name


# And with which they count: what the conditions must let through.
COUNTING = [
    ("train", "--augment --mixup 0.4 --no-flip --scale 0.2 0.9 --ratio 0.8 1.2"),
    ("train", "--augment --randaugment-layers 2 --randaugment-magnitude 5 --cutmix 1"),
    ("train", "--recipe scratch --mixup 0.4 --augment"),
    ("train", "--recipe bit --epochs 3 --momentum 0.5 --learning-rate 0.1 --no-flip --augment"),
    ("train", "--augment --cache-views 4 --cache disk --cache-dtype bfloat16"),
    ("train", "--attack fast --epsilon 8"),
    ("train", "--interpolate 0:1:0.5 --interpolate-data digits"),
    ("train", "--attack pgd --epsilon 8 --attack-steps 3 --cache none"),
    ("train", "--optimizer sgd --momentum 0.5 --schedule step --warmup 0.2"),
    ("train", "--recipe finetune --freeze-to stem --cache memory --frozen-dtype bfloat16"),
    ("train", "--recipe finetune --rates stem=0 --cache-dtype bfloat16"),
    ("train", "--recipe finetune --cache none --pack always"),
    ("train", "--adapter lora --rank 4 --alpha 8 --adapter-dropout 0.1 --adapter-targets head"),
    ("train", "--recipe finetune --adapter bitfit --cache memory"),
    ("train", "--recipe probe --cache disk --cache-dtype bfloat16 --head-after pool"),
    ("train", "--recipe gradual --epochs 20 --find-learning-rate --layer-decay 0.8"),
    ("train", "--dry-run --epochs 3 --workdir run --checkpoint-minutes 5"),
    *((script, "--val-fraction 0.3 --data classes") for script in ("train", "probe", "compare")),
    *((s, "--channels 2 --mean -0.5 0.5 --std 0.2 0.3") for s in ("train", "probe", "compare")),
    ("evaluate", "--data digits --workdir run"),
    ("evaluate", "--data x.csv --target a,b --task regression --units m,s"),
    ("train", "--data x.csv --order a,b --group patient --split-column s --balance"),
    ("train", "--loss focal --focal-gamma 3 --choose-by macro_f1"),
    ("pack", "classes y --size 128 --format jpeg --workers 2 --val-fraction 0.3"),
    ("pack", "x.csv y --target a,b --group patient --interpolation bicubic"),
    ("pack", "x --verify"),
    ("rehearse", "train --on v5e-8 --recipe finetune --freeze-to stem --cache memory"),
    ("rehearse", "extract --on h100-1 classes --out x.npz"),
    ("predict", "x.jpg --out x.csv"),
    ("attack", "x.jpg --workdir run"),
    ("attack", "--data digits --attacks fgsm pgd --steps 3 --seed 2 --out o --pictures 2"),
    ("attack", "--data digits --attacks fgsm --count 3 --seed 2"),
    # A pipeline may give all commands its seed, those without a random number, too.
    ("visualize", "explain x.jpg --seed 1"),
    ("visualize", "features x.jpg --seed 1"),
    ("predict", "x.jpg --seed 1"),
    ("evaluate", "--data digits --seed 1"),
    ("attack", "x.jpg --attacks fgsm --seed 1"),
]


@pytest.mark.parametrize(("script", "line"), COUNTING)
def test_options_with_an_effect_are_accepted(tmp_path, monkeypatch, script, line):
    (tmp_path / "classes" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = tyro.cli(PARSED[script], args=line.split())
    with mock.patch.object(sys, "argv", [script, *line.split()]):
        assert find_unused_settings(config, config.conditions, cli.explicit_options()) == {}


def test_all_options_without_effect_are_named_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "train", "--mixup=0.4", "--momentum", "0.5", "--no-flip") == (
        "error: --no-flip has no effect without --augment; --mixup 0.4 has no effect without "
        "--augment; --momentum 0.5 has no effect without --optimizer sgd"
    )


def test_an_option_of_several_values_may_not_be_repeated(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "train", "--train", "head", "--train=stage7") == (
        "error: --train is given twice: write all its values after one --train"
    )


def options(name: str) -> set[str]:
    return set(inspect.signature(getattr(ATTACKS[name], "func", ATTACKS[name])).parameters)


def test_only_fgsm_takes_no_number_of_steps():
    without = {name for name in ATTACKS if not options(name) & {"num_steps", "num_queries"}}
    assert without == {"fgsm"}


def test_out_of_memory_advises_only_options_of_the_command(capsys):
    def fail(_):
        raise RuntimeError("RESOURCE_EXHAUSTED: 9 GB")

    for name, argv in {"train": [], "predict": [], "weights": ["list"]}.items():
        with mock.patch.object(sys, "argv", [name, *argv]), pytest.raises(SystemExit) as ended:
            cli.main(PARSED[name], fail)
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        advised = {setting(flag) for flag in re.findall(r"--([\w-]+)", line)}
        known = settings(defaults(COMMANDS[f"{name} {'List' if argv else 'Config'}"])).keys()
        assert advised == {"batch_size", "accumulate", "precision", "freeze_to"} & known


# --- going on with a run --------------------------------------------------------------------------

Config = MODULES["train"].Config


def write_run(folder: Path, **of_run: object) -> Path:
    """Write the part of a run directory that --resume reads before it loads anything."""
    folder.mkdir()
    config = {"version": CONFIG_VERSION, **asdict(Config(workdir=folder, **of_run))}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def resumed(*arguments: object) -> object:
    """Return the options with which a run continues."""
    argv = list(map(str, arguments))
    with mock.patch.object(sys, "argv", ["train.py", *argv]):
        return tyro.cli(Config, args=argv).completed()


def test_a_run_continues_with_its_own_options(tmp_path):
    fit = FitConfig("finetune", epochs=7, augment=True, augmentation=AugmentConfig(mixup=0.4))
    run = write_run(tmp_path / "run", fit=fit, seed=3, precision="bfloat16", workers=2, devices=4)
    found = resumed("--resume", run, "--json")
    # Of the machine, not of the run: workers, devices, and how it reports.
    assert found == Config(
        fit=fit, seed=3, precision="bfloat16", workdir=run, resume=run, json=True
    )
    assert resumed("--resume", run, "--workers", 3, "--devices", 1).loading.workers == 3


def test_options_equal_to_those_of_the_run_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = FitConfig("finetune", epochs=7, augment=True, train=("head", "stage7"))
    run = write_run(tmp_path / "run", fit=fit, data=str(tmp_path / "animals"))
    same = "--epochs 7 --augment --train head stage7 --recipe finetune --val-fraction 0.2".split()  # noqa: SIM905
    places = ("--workdir", "run/", "--data", "animals")  # one folder has many names
    assert resumed("--resume", "run", *same, *places).fit == fit
    assert resumed("--resume", run, *same, *places).fit == fit


OTHER = {
    "extension": ("mine.py",),
    "head": ("texts.npz",),
    "model": ("resnet18",),
    "normalization": ("tf",),
    "image-size": (32,),
    "precision": ("bfloat16",),
    "seed": (1,),
    "batch-size": (4,),
    "workdir": ("other",),
    "recipe": ("probe",),
    "head-after": ("pool",),
    "cache": ("disk",),
    "cache-dtype": ("bfloat16",),
    "val-fraction": (0.5,),
    "on-bad-image": ("fail",),
    **{flag: values for flag, values in OF_STEPS.items() if flag not in ("remat", "fsdp")},
    **FIND,
    "balance": (),
    "channels": (2,),
    "mean": (-0.5, 0.5),
    "std": (0.2, 0.3),
    **{flag: values for flag, values in LABELS_OF_DATA.items() if flag != "root"},
}
OF_NOW = {
    *("workers", "devices", "distributed", "json", "debug", "platform", "resume"),
    *("dry_run", "find_learning_rate"),
    *("remat", "fsdp"),  # how the memory of this machine is used
    *("data", "root", "weights"),  # where they are now; whether they are the same is another test
}


def test_options_that_differ_from_those_of_the_run_are_refused(capsys, tmp_path, monkeypatch):
    assert {*map(setting, OTHER)} | OF_NOW == settings(Config()).keys()
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run")
    given = [written(*flag) for flag in OTHER.items()]
    said = refused(capsys, "train", "--resume", run, *" ".join(given).split())
    assert sorted(
        said.partition("leave out ")[2].removesuffix(", or start a new run").split(", ")
    ) == sorted(given)


def test_all_options_that_differ_are_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", fit=FitConfig(augment=True))
    said = refused(
        capsys, "train", "--resume", "run", "--epochs", 3, "--learning-rate=1", "--no-augment"
    )
    assert said == (
        "error: run continues with its own options: leave out --epochs 3, --no-augment, "
        "--learning-rate 1.0, or start a new run"
    )


def test_a_run_with_options_that_have_no_effect_continues(tmp_path):
    fit = FitConfig(augmentation=AugmentConfig(mixup=0.4))
    run = write_run(tmp_path / "run", fit=fit)
    assert resumed("--resume", run).fit == fit


def test_explicit_options_are_found_in_every_notation():
    argv = "train.py --mixup=0.4 --no-flip --image_size 3 --train head --data no_x"
    with mock.patch.object(sys, "argv", argv.split(" ")):
        assert cli.explicit_options() == {"mixup", "flip", "image_size", "train", "data"}
