"""One file a command: its options, the calls that it makes, and what it prints."""

import sys
from importlib import import_module

COMMANDS = {
    "train": "Train a classifier of your own images on top of a pretrained network.",
    "predict": "Name what is on photographs.",
    "evaluate": "Measure a network on labelled images.",
    "probe": "Fit a linear probe and nearest neighbours to frozen features.",
    "compare": "Probe several networks on one data set.",
    "attack": "Measure how little it takes to fool a network.",
    "visualize": "Paint what a network looks at and has in mind.",
    "weights": "List, verify, import and export pretrained weights.",
}


def main() -> None:
    """Run ``tljax COMMAND``; its module is imported only then, so that ``--help`` is quick."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"tljax {name}", *sys.argv[2:]]
        import_module(f"tljax.commands.{name}").main()
        return
    usage = "\n".join(f"  {name:10} {line}" for name, line in COMMANDS.items())
    text = f"usage: tljax COMMAND [OPTIONS]; tljax COMMAND --help lists the options\n\n{usage}"
    if name in ("-h", "--help"):
        print(text)
        return
    print(f"error: no command is called '{name}'\n{text}", file=sys.stderr)
    sys.exit(2)
