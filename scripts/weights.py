"""``tljax weights``."""

from tljax.commands.weights import main

if __name__ == "__main__":
    main()
