"""Exceptions that commands turn into one line and an exit code."""


class RequestError(ValueError):
    """A request cannot be fulfilled: one line that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """


class WriteError(RequestError):
    """A file cannot be written."""


class UnreadableImageError(ValueError):
    """One image cannot be read; ``skipped.csv`` records the message as the reason."""


class VerificationError(Exception):
    """A requested comparison failed: one line; commands exit with code 1."""


class DivergenceError(ArithmeticError):
    """Training diverged, its loss is NaN or infinite: one line; commands exit with code 1."""


class StoppedError(BaseException):
    """Training was stopped early and can be resumed: one line; commands exit with `CODE`.

    Like `KeyboardInterrupt` it is not an `Exception`: SIGTERM may raise it anywhere, and code that
    treats every `Exception` as a damaged file must not catch it.
    """

    CODE = 75  # EX_TEMPFAIL: schedulers run the job again

    def __init__(self, message: str = "stopped by SIGTERM") -> None:
        super().__init__(message)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
