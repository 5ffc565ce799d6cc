"""``tljax visualize``."""

from tljax.commands.visualize import main

if __name__ == "__main__":
    main()
