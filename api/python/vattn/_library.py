"""Finds and loads libvattn, and turns its codes into exceptions."""

import ctypes
import ctypes.util
import os
import pathlib
from typing import Any

from ._structs import FUNCTIONS, Status

VERSION = "0.1"  # of the C API that this package speaks: major.minor


class Error(Exception):
    """A call that failed. The message is the library's text; `status` says of what kind it is."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(f"{status.name}: {text}")
        self.status = status
        self.text = text


class InvalidArgumentError(Error, ValueError):
    """The text names the argument, its value and the limit."""


class OutOfMemoryError(Error, MemoryError):
    """The system refused memory."""


class NotSupportedError(Error):
    """Valid, but not by this build or backend."""


class FullError(Error):
    """The library's own pool is full. Need, limit and knob are in the text; nothing is lost."""


_ERRORS = {
    Status.INVALID_ARGUMENT: InvalidArgumentError,
    Status.OUT_OF_MEMORY: OutOfMemoryError,
    Status.NOT_SUPPORTED: NotSupportedError,
    Status.FULL: FullError,
}


def invalid(text: str) -> InvalidArgumentError:
    """The error for an argument that this package itself refuses."""
    return InvalidArgumentError(Status.INVALID_ARGUMENT, text)


def _find() -> str:
    """VATTN_LIBRARY, else the library in the package's folder, else the system's."""
    named = os.environ.get("VATTN_LIBRARY")
    if named:
        return named
    bundled = pathlib.Path(__file__).with_name("libvattn.so")
    if bundled.is_file():
        return str(bundled)
    return ctypes.util.find_library("vattn") or f"libvattn.so.{VERSION}"


def _load() -> Any:
    path = _find()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"libvattn cannot be loaded: {error}. It is looked for in VATTN_LIBRARY (a path), in "
            f"{pathlib.Path(__file__).parent} and where the system keeps libraries; "
            "pip install ./api/python builds it."
        ) from None
    library.vattn_version.restype = ctypes.c_char_p
    version = library.vattn_version().decode()
    if version.rsplit(".", 1)[0] != VERSION:
        raise ImportError(f"{path} is vattn {version}; this package needs {VERSION}")
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if result is Status else result
    return library


LIBRARY = _load()


def call(name: str, *arguments: Any) -> None:
    """Calls a function that returns vattn_code and raises `Error` unless that is OK."""
    code = getattr(LIBRARY, name)(*arguments)
    if code:
        status = Status(code)
        raise _ERRORS.get(status, Error)(
            status, LIBRARY.vattn_last_error().decode(errors="replace")
        )


def text(name: str, *arguments: Any) -> str:
    """What a call with buffer, size and needed at its end writes."""
    needed = ctypes.c_size_t()
    size = 0
    while True:
        buffer = ctypes.create_string_buffer(size) if size else None
        call(name, *arguments, buffer, size, ctypes.byref(needed))
        if needed.value < size:
            assert buffer is not None
            return buffer.value.decode()
        size = needed.value + 64  # counters may grow a digit between the calls


def made(name: str, *arguments: Any) -> int:
    """The handle that a call with `out` at its end creates."""
    handle = ctypes.c_void_p()
    call(name, *arguments, ctypes.byref(handle))
    assert handle.value is not None
    return handle.value


def struct(kind: type, initialise: str) -> Any:
    """A struct filled with the library's defaults."""
    value = kind()
    getattr(LIBRARY, initialise)(ctypes.byref(value), ctypes.sizeof(kind))
    return value
