"""``tljax``, and the ``--help`` of every command: its time and its language."""

import io
import os
import re
import resource
import statistics
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from unittest import mock

import pytest

from tljax.commands import COMMANDS, main


def processor_seconds(*arguments: str) -> float:
    """Return the processor time of a command, which other load on the machine hardly changes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: tljax" in done.stdout or "--help" not in arguments
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "train")) for name in COMMANDS]
)
def test_help_takes_less_than_three_times_as_long_as_importing_its_parser(name: str):
    """Parsing a hundred options takes as long as the import; importing JAX would take much more."""
    turns = [
        (processor_seconds("-m", "tljax", name, "--help"), processor_seconds("-c", "import tyro"))
        for _ in range(7)
    ]
    ours, parser = map(statistics.median, zip(*turns, strict=True))
    assert ours < 3 * parser


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    with mock.patch.object(sys, "argv", ["tljax", *arguments]):
        try:
            main()
        except SystemExit as done:
            return int(done.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


SUBCOMMANDS = {
    "weights": ("list", "verify", "import", "export"),
    "rehearse": ("train", "probe", "attack", "evaluate", "extract"),
    "visualize": ("ideal", "explain", "features", "dream", "channel"),
}
ALL = [
    (name, *sub)
    for name in COMMANDS
    for sub in [(sub,) for sub in SUBCOMMANDS.get(name, ())] or [()]
]

IMPERATIVES = {
    *(
        "Amplify",
        "Check",
        "Classify",
        "Compare",
        "Compile",
        "Draw",
        "List",
        "Measure",
        "Pack",
        "Port",
    ),
    *("Print", "Train", "Write"),
}
# Words of no noun phrase and no imperative, with which a text for an option must not begin.
FRAGMENTS = {
    *("A", "An", "The", "As", "At", "By", "For", "From", "How", "If", "In", "Is", "It", "Of", "On"),
    *("This", "To", "What", "When", "Where", "Whether", "Which", "Who", "Whose", "With"),
}
FORBIDDEN = (
    "of everything|asked|asks|stands?|whoever|wish|rooms?|say of|knows?|goes? on|going on|in turn"
    "|theirs|shall|found out|so many|what it|nobody|labelled|neighbours?|normalis|optimis|colour"
)


def help_of(monkeypatch, *command: str) -> tuple[str, dict[str, str]]:
    """Return the description of a command, and the help text of every option."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["tljax", *command, "--help"])
    out = io.StringIO()  # has no encoding, so that boxes are drawn with spaces
    with redirect_stdout(out), pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    _, description, *boxes = out.getvalue().split("\n\n")
    description = " ".join(description.split())
    options, flag = {}, ""
    for line in "\n".join(boxes).splitlines():
        if line.startswith(" " * 8):
            options[flag] = f"{options[flag]} {line.strip()}".strip()
        elif match := re.match(r"  ((?:--?[a-z]|\[|[A-Z]{3}).*?)(  .*)?$", line.rstrip()):
            flag = match[1]
            options[flag] = (match[2] or "").strip()
    return description, {flag: text for flag, text in options.items() if flag != "-h, --help"}


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_help_text_is_a_sentence_with_its_default(monkeypatch, command):
    description, options = help_of(monkeypatch, *command)
    assert description.split()[0] in IMPERATIVES
    assert description.endswith(".")
    assert {"--json, --no-json", "--debug, --no-debug"} < options.keys()
    for flag, text in options.items():
        words, _, default = text.rpartition(" (")
        assert re.match("[A-Z]", words), (flag, text)
        assert words.endswith("."), (flag, text)
        assert words.split()[0] not in FRAGMENTS, (flag, text)
        if re.search(r"\b(INT|FLOAT)\b", flag):
            assert default != "default: None)" or "by default" in words.lower(), (flag, text)
    for text in (description, *options.values()):
        assert not re.search(rf"\b({FORBIDDEN})\b", text, re.IGNORECASE), text


def test_the_list_of_commands_has_an_imperative_sentence_for_each():
    for line in COMMANDS.values():
        assert line.split()[0].rstrip(",") in IMPERATIVES
        assert line.endswith(".")
        assert not re.search(rf"\b({FORBIDDEN})\b", line, re.IGNORECASE)


def test_the_version_is_printed(capsys):
    assert ended(capsys, "--version") == (0, f"tljax {version('tljax')}\n", "")


def test_no_command_and_help_list_them(capsys):
    for arguments in ((), ("-h",), ("--help",)):
        code, out, err = ended(capsys, *arguments)
        assert (code, err) == (0, "")
        assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("word", "said"),
    [("trian", "did you mean train? --help"), ("x", "--help"), ("--train", "did you mean train?")],
)
def test_an_unknown_command_is_one_line_with_the_nearest(capsys, word, said):
    code, out, err = ended(capsys, word, "--epochs", "3")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown command '{word}'; {said}")
    assert len(err.splitlines()) == 1


def test_a_renamed_option_is_refused_with_its_new_name(capsys):
    for words in (["--average", "0.9"], ["--average=0.9"]):
        assert ended(capsys, "train", *words) == (
            2, "", "error: --average was renamed: use --ema-decay\n",
        )  # fmt: skip
    assert "typeguard" not in sys.modules or hasattr(sys.modules["typeguard"], "typechecked")
