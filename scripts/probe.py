"""``tljax probe``."""

from tljax.commands.probe import main

if __name__ == "__main__":
    main()
