"""The command ``tljax attack``."""

from tljax.commands import run_command

if __name__ == "__main__":
    run_command("attack")
