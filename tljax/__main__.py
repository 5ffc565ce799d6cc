"""Run the ``tljax`` command by ``python -m tljax``."""

from tljax.commands import main

if __name__ == "__main__":
    main()
