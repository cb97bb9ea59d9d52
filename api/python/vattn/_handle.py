"""Handles of the library: owned by one Python object each, closed once."""

from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from ._errors import invalid
from ._library import LIBRARY

if TYPE_CHECKING:
    from ._runtime import Runtime


class Handle:
    """A handle of the library: closed once, by `close`, by `with`, or when it is collected.

    It lives in this process and has one owner: it can be neither copied nor pickled.
    """

    _instead: ClassVar[dict[str, str]] = {}  # "copied", "pickled" -> what to do in its place

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @property
    def handle(self) -> int:
        """The C pointer."""
        if self._handle is None:
            raise invalid(f"{type(self).__name__} is closed, must be open")
        return self._handle

    @property
    def closed(self) -> bool:
        """Nothing but `close` can be called any more."""
        return getattr(self, "_handle", None) is None

    def close(self) -> None:
        """Frees it; a second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:  # None also if __init__ failed
            self.close()

    def _refuse(self, how: str) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"a {name} cannot be {how}, it is a handle of this process: {self._instead[how]}"
        )

    def __copy__(self) -> Self:
        self._refuse("copied")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("pickled")


class Child(Handle):
    """A handle that belongs to a runtime, which closes it when it is closed itself."""

    _destroy = ""

    def __init__(self, runtime: "Runtime", handle: int) -> None:
        super().__init__(handle)
        self.runtime = runtime
        runtime._open[handle] = getattr(LIBRARY, self._destroy)

    @property
    def handle(self) -> int:
        """The C pointer."""
        if self._handle is not None and self.runtime.closed:
            raise invalid(f"{type(self).__name__} is closed, as its Runtime is, must be open")
        return super().handle

    @property
    def closed(self) -> bool:
        """Nothing but `close` can be called any more."""
        return super().closed or self.runtime.closed

    def close(self) -> None:
        """Frees it; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            destroy = self.runtime._open.pop(handle, None)  # None: the runtime has done it
            if destroy is not None:
                destroy(handle)
