"""Arguments on their way into C: refused by name where C would take them for something else.

ctypes cuts integers to their lowest bits and texts at the first zero byte without a word.
"""

import enum
import operator
import os
from typing import Any

from ._enums import DType
from ._errors import invalid

# Other names of the element types: those of torch and numpy.
_DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}


def shown(value: Any) -> str:
    """A value for an error text: in one line, cut if it is long."""
    text = " ".join(repr(value).splitlines())
    return text if len(text) <= 200 else f"{text[:197]}..."


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number of Python, numpy or torch, or True or False for 1 and 0."""
    # Unlike Python's, the bool of numpy is no index.
    if str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        value = bool(value)
    try:
        number = operator.index(value)
    except TypeError:
        raise invalid(f"{name} is {shown(value)}, must be a whole number") from None
    if not low <= number <= high:
        raise invalid(f"{name} is {shown(number)}, must be {low} to {high}")
    return number


def number(value: Any, name: str) -> float:
    """A number of Python, numpy or torch that keeps its kind as a float of 32 bits.

    NaN and infinity are refused, and so is what becomes infinity, or 0: that often means a default.
    """
    wrong = isinstance(value, bool | str | bytes) or getattr(value, "ndim", 0) != 0
    try:
        if wrong or isinstance(value, complex):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise invalid(f"{name} is {shown(value)}, must be a number") from None
    size = abs(result)
    if not (result == 0 or 2.0**-149 <= size < (2 - 2.0**-24) * 2.0**127):
        raise invalid(f"{name} is {shown(value)}, must be a finite number that 32 bits can hold")
    return result


def path(value: Any, name: str) -> bytes:
    """A path as the system has it: bytes that need not be UTF-8."""
    try:
        encoded = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        raise invalid(f"{name} is {shown(value)}, must be a str, bytes or os.PathLike") from None
    if b"\0" in encoded:
        raise invalid(f"{name} is {shown(value)}, must have no zero byte")
    return encoded


def salt_bytes(value: Any) -> bytes:
    """The salt of a stored prefix, which may have zero bytes."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise invalid(f"salt is {shown(value)}, must be bytes")
    return bytes(value)


def choice(value: Any, name: str, kind: type[enum.IntEnum]) -> enum.IntEnum:
    """A member of an enumeration: itself, its lower-case name or its number; element types as well.

    Members of other enumerations are refused, although they are numbers too.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        found = kind.__members__.get(value.upper()) if value == value.lower() else None
        if found is not None:
            return found
    elif type(value) is int and value in set(kind):
        return kind(value)
    if kind is DType:
        # "torch.float16" and numpy.dtype("float16") by text, the class numpy.float16 by name.
        for text in (str(value).removeprefix("torch."), getattr(value, "__name__", "")):
            if text in _DTYPES:
                return _DTYPES[text]
    members = [f'"{member.lower()}"' for member in kind.__members__]
    raise invalid(f"{name} is {shown(value)}, must be {', '.join(members[:-1])} or {members[-1]}")
