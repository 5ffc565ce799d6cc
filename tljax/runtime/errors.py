"""The ways in which tljax says no."""


class RequestError(ValueError):
    """What was asked for cannot be done: one line that says what, where, and what to do next.

    Commands print it without a traceback and exit with code 2.
    """


class WriteError(RequestError):
    """A file cannot be written."""


class UnreadableImageError(ValueError):
    """One image cannot be used; the message is the reason that ends up in ``skipped.csv``."""


class VerificationError(Exception):
    """A comparison that was asked for did not hold: one line; commands exit with code 1."""


class DivergenceError(ArithmeticError):
    """A loss is no finite number any more: one line with advice; commands exit with code 1."""


class StoppedError(Exception):
    """Training was asked to end early and lost nothing: one line; commands exit with `CODE`."""

    CODE = 75  # EX_TEMPFAIL, which schedulers take for "run it again"

    def __init__(self, message: str = "stopped by SIGTERM") -> None:
        super().__init__(message)
