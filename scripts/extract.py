"""The command ``tljax extract``."""

from tljax.commands import run_command

if __name__ == "__main__":
    run_command("extract")
