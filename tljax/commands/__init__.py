"""One module for each command: its options, the calls that it makes, and its output."""

import sys
from importlib import import_module

COMMANDS = {
    "train": "Train a pretrained network to predict classes, labels or numbers of your own images.",
    "predict": "Classify images.",
    "evaluate": "Measure the accuracy of a network on labeled images.",
    "probe": "Measure frozen features by a linear probe and nearest neighbors.",
    "extract": "Write the features of images to a file.",
    "compare": "Compare pretrained networks on a data set.",
    "pack": "Pack a data set into files that are read without decoding.",
    "attack": "Measure the accuracy of a network under adversarial attacks.",
    "rehearse": "Compile a command's programs for a TPU or GPU that is not at hand.",
    "visualize": "Draw what a network and its stages respond to.",
    "weights": "List, verify, import and export pretrained weights.",
    "doctor": "Check the installation, the devices and the cache folder.",
}


def run_command(name: str) -> None:
    """Run a command of `COMMANDS`; only its module is imported, which keeps ``--help`` fast."""
    command = import_module(f"tljax.commands.{name}")
    command.cli.main(command.Config, command.run)


def main() -> None:
    """Run ``tljax COMMAND``."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"tljax {name}", *sys.argv[2:]]
        run_command(name)
    elif name in ("-h", "--help"):
        print("usage: tljax COMMAND [OPTIONS]; tljax COMMAND --help lists the options\n")
        print("\n".join(f"  {name:10} {line}" for name, line in COMMANDS.items()))
    elif name == "--version":
        from importlib.metadata import version

        print(f"tljax {version('tljax')}")
    else:
        from difflib import get_close_matches

        similar = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        print(f"error: unknown command '{name}'; {hint}--help lists them all", file=sys.stderr)
        sys.exit(2)
