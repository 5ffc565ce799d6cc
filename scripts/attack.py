"""``tljax attack``."""

from tljax.commands.attack import main

if __name__ == "__main__":
    main()
