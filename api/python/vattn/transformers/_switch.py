"""Which attention a model has while it is offloaded, and the way back."""

import functools
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import _attention
from ._cache import VattnCache
from ._calls import after_forward, before_forward, without_adapters
from ._served import endless_window

if TYPE_CHECKING:
    from ._model import OffloadedModel

_switches: "weakref.WeakKeyDictionary[Any, Switch]" = weakref.WeakKeyDictionary()
_running = threading.local()  # .models: those whose `generate` this thread is in


class Switch:
    """One for each offloaded model, shared by all its wraps: the first turns vattn's attention on,
    the last one gives the model its own back. Does not keep the model alive."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._config = model.config.get_text_config(decoder=True)
        self._before = {
            key: "sdpa" if name == _attention.NAME else name  # sdpa: a copy of an offloaded model
            for key, name in _implementations(model).items()
        }
        self._window: int | None = None
        self._wraps: list[weakref.ref[OffloadedModel]] = []
        if endless_window(self._config):
            self._window, self._config.sliding_window = self._config.sliding_window, None
        try:
            model.set_attn_implementation(_attention.NAME)
            if self._config._attn_implementation != _attention.NAME:
                raise ValueError(
                    f"{type(model).__name__} does not attend through transformers' "
                    "AttentionInterface"
                )
        except BaseException:
            self._restore(model)
            raise
        self._hooks = _hook(model)
        model.__dict__["generate"] = _Generate(model, self)

    def _restore(self, model: Any) -> None:
        # Another attention that was set meanwhile is left alone.
        if _attention.NAME in _implementations(model).values():
            one = len(set(self._before.values())) == 1
            model.set_attn_implementation(self._before[""] if one else self._before)
        if self._window is not None:
            self._config.sliding_window = self._window

    def _unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()

    def is_on(self) -> bool:
        """Does the model attend through vattn, or has someone set another attention since."""
        return bool(self._config._attn_implementation == _attention.NAME)

    def attention(self) -> Any:
        """The name of the attention that the model has now."""
        return self._config._attn_implementation

    def newest(self) -> "OffloadedModel | None":
        """The wrap that was made last and is open."""
        alive = [wrap() for wrap in self._wraps]
        return next((wrap for wrap in reversed(alive) if wrap is not None), None)

    def add(self, wrap: "OffloadedModel") -> "weakref.ref[OffloadedModel]":
        """Counts a wrap in; returns what `remove` takes."""
        self._wraps.append(weakref.ref(wrap))
        return self._wraps[-1]

    def remove(self, wrap: "weakref.ref[OffloadedModel]") -> None:
        """Counts a wrap out, and gives the model its own attention back after the last one."""
        if wrap not in self._wraps:
            return
        self._wraps.remove(wrap)
        model = self._model()
        if self._wraps or model is None:
            return
        _switches.pop(model, None)
        self._unhook()
        model.__dict__.pop("generate", None)
        self._restore(model)

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """The model's own attention for a while, also for other threads."""
        model = self._model()
        assert model is not None
        self._restore(model)
        self._unhook()
        try:
            yield
        finally:
            if self._window is not None:
                self._config.sliding_window = None
            model.set_attn_implementation(_attention.NAME)
            self._hooks = _hook(model)


def switch_of(model: Any) -> Switch:
    """The switch of a model, turned on if it is the first. Raises before anything is changed, or
    with everything as before."""
    if model not in _switches:
        _switches[model] = Switch(model)
    return _switches[model]


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


def _hook(model: Any) -> tuple[Any, Any]:
    """Hooks the model itself."""
    inner = without_adapters(model)
    return (
        inner.register_forward_pre_hook(before_forward, with_kwargs=True),
        inner.register_forward_hook(after_forward, with_kwargs=True),
    )


def _implementations(model: Any) -> dict[str, str]:
    """The attention of a model ("") and of each part that has a config of its own, as
    set_attn_implementation takes it."""
    parts = {
        key: getattr(model.config, key)._attn_implementation
        for key in getattr(model.config, "sub_configs", {})
        if getattr(model.config, key, None) is not None
    }
    return {"": model.config._attn_implementation} | parts


class _Generate:
    """What `model.generate` is while the model is offloaded: that of its newest wrap, so that code
    which only knows the model, as pipelines do, decodes from offloaded KV too."""

    def __init__(self, model: Any, switch: Switch) -> None:
        self._model, self._switch = weakref.ref(model), weakref.ref(switch)
        functools.update_wrapper(self, type(model).generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        switch, model = self._switch(), self._model()
        wrap = None if switch is None else switch.newest()
        if switch is None or wrap is None or not switch.is_on():
            return type(model).generate(model, *args, **kwargs)
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
        # A copy of the model generates as its class does.
        model = self._model()
        twin = memo.get(id(model))
        return types.MethodType(type(model).generate, model if twin is None else twin)

    def __reduce__(self) -> Any:
        raise TypeError("an offloaded model cannot be pickled: close the wrap first")
