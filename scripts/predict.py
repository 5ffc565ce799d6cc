"""The command ``tljax predict``."""

from tljax.commands import run_command

if __name__ == "__main__":
    run_command("predict")
