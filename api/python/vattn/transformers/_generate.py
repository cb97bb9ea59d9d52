"""`generate` of a model while it is offloaded."""

import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ._cache import VattnCache
from ._calls import without_adapters

if TYPE_CHECKING:
    from ._switch import Switch

_running = threading.local()  # .models: those whose `generate` this thread is in


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Within it, `generate` of this offloaded model is the model's own on this thread."""
    if not hasattr(_running, "models"):
        _running.models = []
    _running.models.append(without_adapters(model))
    try:
        yield
    finally:
        _running.models.pop()


def _runs(model: Any) -> bool:
    inner = without_adapters(model)
    return any(other is inner for other in getattr(_running, "models", ()))


class Generate:
    """What `model.generate` is while the model is offloaded: that of its newest wrap, so that code
    which only knows the model, as pipelines do, decodes from offloaded KV too."""

    def __init__(self, model: Any, switch: "Switch") -> None:
        self._model, self._switch = weakref.ref(model), weakref.ref(switch)
        # The model may have a `generate` of its own that is not its class's. It is kept here, by
        # the model alone: whatever else kept it would keep the model alive.
        self._attribute: dict[str, Any] = {
            name: value for name, value in vars(model).items() if name == "generate"
        }
        functools.update_wrapper(self, self.attribute() or type(model).generate, updated=())

    def attribute(self) -> Any:
        """The `generate` that the model had as an attribute, or None: it had its class's alone."""
        return self._attribute.get("generate")

    def give_back(self, model: Any) -> None:
        """The model has what it had before. What was set or deleted meanwhile is left alone."""
        if vars(model).get("generate") is self:
            del vars(model)["generate"]
            vars(model).update(self._attribute)

    def own(self) -> Callable[..., Any]:
        """The model's own: its attribute, else that of its class."""
        model = self._model()
        assert model is not None
        own: Callable[..., Any] = self.attribute() or types.MethodType(type(model).generate, model)
        return own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        switch, model = self._switch(), self._model()
        wrap = None if switch is None else switch.newest()
        if switch is None or wrap is None or not switch.is_on():
            return self.own()(*args, **kwargs)
        if not _runs(model):
            return wrap.generate(*args, **kwargs)
        if not any(isinstance(kwargs.get(x), VattnCache) for x in ("cache", "past_key_values")):
            raise RuntimeError(
                f"generate of {type(model).__name__} is called, without a cache of vattn, while a "
                "generate of the same offloaded model runs (by a streamer, a logits processor or a "
                "stopping criterion): must be `generate` of the wrapped model there, or be called "
                "after the first has ended"
            )
        return type(model).generate(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model has a copy of its attribute, or generates as its class does.
        if self.attribute() is not None:
            return deepcopy(self.attribute(), memo)
        model = self._model()
        twin = memo.get(id(model))
        return types.MethodType(type(model).generate, model if twin is None else twin)

    def __reduce__(self) -> Any:
        raise TypeError("an offloaded model cannot be pickled: close the wrap first")
