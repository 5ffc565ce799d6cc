"""``tljax extract``."""

from tljax.commands.extract import main

if __name__ == "__main__":
    main()
