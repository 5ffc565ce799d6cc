"""``python -m tljax`` is ``tljax``."""

from tljax.commands import main

if __name__ == "__main__":
    main()
