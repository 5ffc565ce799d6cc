"""``tljax predict``."""

from tljax.commands.predict import main

if __name__ == "__main__":
    main()
