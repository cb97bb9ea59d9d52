"""What the package raises."""

from typing import Any

from ._enums import Status


class Error(Exception):
    """A call that failed. The message is the library's text; `status` says of what kind it is."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(f"{status.name}: {text}")
        self.status = status
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an exception is made anew from its message alone, which __init__ does not take.
        return type(self), (self.status, self.text), self.__dict__


class InvalidArgumentError(Error, ValueError):
    """The text names the argument, its value and the limit."""


class OutOfMemoryError(Error, MemoryError):
    """The system refused memory."""


class NotSupportedError(Error):
    """Valid, but not by this build or backend."""


class FullError(Error):
    """The library's own pool is full. Need, limit and knob are in the text; nothing is lost."""


_CLASSES = {
    Status.INVALID_ARGUMENT: InvalidArgumentError,
    Status.OUT_OF_MEMORY: OutOfMemoryError,
    Status.NOT_SUPPORTED: NotSupportedError,
    Status.FULL: FullError,
}


def invalid(text: str) -> InvalidArgumentError:
    """The error for an argument that this package itself refuses."""
    return InvalidArgumentError(Status.INVALID_ARGUMENT, text)


def error_of(code: int, text: str) -> Error:
    """The error for what a call of the library answered."""
    if code not in set(Status):  # from a newer library: codes are only appended
        return Error(Status.INTERNAL, f"code {code}, which this package does not know: {text}")
    status = Status(code)
    return _CLASSES.get(status, Error)(status, text)
