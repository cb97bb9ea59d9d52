"""What is replaced of a model while it is offloaded, and the way back."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._attention import NAME
from ._attentions import Attentions
from ._calls import after_forward, before_forward, without_adapters
from ._generate import Generate
from ._served import endless_window

if TYPE_CHECKING:
    from ._model import OffloadedModel

_switches: "weakref.WeakKeyDictionary[Any, Switch]" = weakref.WeakKeyDictionary()


class Switch:
    """One for each offloaded model, shared by all its wraps: the first turns vattn's attention on,
    the last one gives the model back what it had. Does not keep the model alive."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._config = model.config.get_text_config(decoder=True)
        self._attentions = Attentions(model)
        self._window: int | None = None
        self._wraps: list[weakref.ref[OffloadedModel]] = []
        self._hooks: list[Any] = []
        self._aside, self._lock = 0, threading.Lock()  # calls that run on the model's own attention
        self._generate: weakref.ref[Generate] | None = None
        try:
            model.set_attn_implementation(NAME)
            if not self.is_on():
                raise ValueError(
                    f"{type(model).__name__} does not attend through transformers' "
                    "AttentionInterface"
                )
            self._attentions.turned_on()
            if endless_window(self._config):
                self._window = self._config.sliding_window
                self._set_window(None)
            _hook(model, self._hooks)
            generate = Generate(model, self)
            self._generate = weakref.ref(generate)  # the model has it, or what replaced it there
            vars(model)["generate"] = generate
        except BaseException:
            self._give_back()
            raise

    def _give_back(self) -> None:
        model, generate = self._model(), None if self._generate is None else self._generate()
        self._unhook()
        if model is not None and generate is not None:
            generate.give_back(model)
        self._attentions.give_back()
        self._give_window_back()

    def _give_window_back(self) -> None:
        if self._window is not None and self._config.sliding_window is None:
            self._set_window(self._window)

    def _set_window(self, window: int | None) -> None:
        # Past the config, which may take numbers alone.
        name = getattr(self._config, "attribute_map", {}).get("sliding_window", "sliding_window")
        vars(self._config)[name] = window

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def is_on(self) -> bool:
        """Does the model attend through vattn, or has someone set another attention since."""
        return bool(self._config._attn_implementation == NAME)

    def why_off(self) -> str | None:
        """Why the model does not attend through vattn; None: it does."""
        if self.is_on():
            return None
        name = repr(self._config._attn_implementation)
        if not self._wraps:
            return f"the model is not offloaded any more and attends by {name}: its wrap was closed"
        if self._aside:
            return (
                f"the model attends by {name} just now: a call on another thread needs it "
                "(output_attentions, or use_cache=False)"
            )
        return (
            f"the model's attention was set to {name} after it was offloaded: close the wrap, or "
            "set it to 'vattn' again"
        )

    def newest(self) -> "OffloadedModel | None":
        """The wrap that was made last and is open."""
        alive = [wrap() for wrap in self._wraps]
        return next((wrap for wrap in reversed(alive) if wrap is not None), None)

    def add(self, wrap: "OffloadedModel") -> "weakref.ref[OffloadedModel]":
        """Counts a wrap in; returns what `remove` takes."""
        self._wraps.append(weakref.ref(wrap))
        return self._wraps[-1]

    def remove(self, wrap: "weakref.ref[OffloadedModel]") -> None:
        """Counts a wrap out, and gives the model back what it had after the last one."""
        if wrap not in self._wraps:
            return
        self._wraps.remove(wrap)
        if self._wraps:
            return
        model = self._model()
        if model is not None and _switches.get(model) is self:
            del _switches[model]
        self._give_back()

    def attribute(self) -> Any:
        """The `generate` that the model had as an attribute, or None: it had its class's alone."""
        generate = None if self._generate is None else self._generate()
        return None if generate is None else generate.attribute()

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """The model's own attention for a while, also for other threads."""
        model = self._model()
        assert model is not None
        with self._lock:
            self._aside += 1
            self._attentions.give_back()
            self._give_window_back()
            self._unhook()
        try:
            yield
        finally:
            with self._lock:
                self._aside -= 1
                if self._wraps and not self._aside:  # no wraps: the last one was closed meanwhile
                    if self._window is not None:
                        self._set_window(None)
                    self._attentions.turn_on_again()
                    _hook(model, self._hooks)


def switch_of(model: Any) -> Switch:
    """The switch of a model, turned on if it is the first. Raises before anything is changed, or
    with everything as before."""
    if model not in _switches:
        _switches[model] = Switch(model)
    return _switches[model]


def _hook(model: Any, handles: list[Any]) -> None:
    """Hooks the model itself; the handles are added to those given."""
    inner = without_adapters(model)
    handles.append(inner.register_forward_pre_hook(before_forward, with_kwargs=True))
    handles.append(inner.register_forward_hook(after_forward, with_kwargs=True))
