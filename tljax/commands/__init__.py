"""One file a command: its options, the calls that it makes, and what it prints."""

import sys
from importlib import import_module

COMMANDS = {
    "train": "Train a classifier of your own images on top of a pretrained network.",
    "predict": "Name what is on photographs.",
    "evaluate": "Measure a network on labelled images.",
    "probe": "Fit a linear probe and nearest neighbours to frozen features.",
    "extract": "Write the embeddings of images to a file.",
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
    elif name in ("-h", "--help"):
        print("usage: tljax COMMAND [OPTIONS]; tljax COMMAND --help lists the options\n")
        print("\n".join(f"  {name:10} {line}" for name, line in COMMANDS.items()))
    else:
        from difflib import get_close_matches

        close = get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        print(
            f"error: no command is called '{name}'; {meant}--help lists them all", file=sys.stderr
        )
        sys.exit(2)
