"""Finds and loads libvattn, checks what calls are given, and turns its codes into exceptions."""

import ctypes
import ctypes.util
import os
import pathlib
from typing import Any

from ._enums import Status
from ._errors import error_of
from ._structs import FUNCTIONS, fit
from ._version import __version__

VERSION = __version__.rsplit(".", 1)[0]  # of the C API that this package speaks: major.minor


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
            "`pip install ./api/python` in vattn's sources builds it."
        ) from None
    version = _function(library, path, "vattn_version", ctypes.c_char_p, [])().decode(
        errors="replace"
    )
    if version.rsplit(".", 1)[0] != VERSION:
        raise ImportError(f"{path} is vattn {version}; this package needs {VERSION}")
    for name, (result, arguments) in FUNCTIONS.items():
        restype = ctypes.c_int if result is Status else result
        _function(library, path, name, restype, list(arguments.values()))
    return library


def _function(library: Any, path: str, name: str, result: Any, arguments: list[Any]) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError:
        raise ImportError(
            f"{path} is not the libvattn of this package, {__version__}: it has no {name}. "
            "VATTN_LIBRARY names another library, or an older build."
        ) from None
    function.restype, function.argtypes = result, arguments
    return function


LIBRARY = _load()


def call(name: str, *arguments: Any) -> None:
    """Calls a function that returns vattn_code and raises `Error` unless that is OK.

    Whole numbers and texts that C would get as others are refused by name.
    """
    kinds = FUNCTIONS[name][1].items()
    fitting = [fit(value, *kind) for value, kind in zip(arguments, kinds, strict=True)]
    code = getattr(LIBRARY, name)(*fitting)
    if code:
        raise error_of(code, LIBRARY.vattn_last_error().decode(errors="replace"))


def text(name: str, *arguments: Any) -> str:
    """What a call with buffer, size and needed at its end writes."""
    needed = ctypes.c_size_t()
    size = 0
    while True:
        buffer = ctypes.create_string_buffer(size) if size else None
        call(name, *arguments, buffer, size, ctypes.byref(needed))
        if needed.value < size:
            assert buffer is not None
            return buffer.value.decode(errors="replace")
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
