"""Which attention the configs of a model and of its parts say, and the way back."""

from typing import Any

from transformers import PreTrainedModel

from ._attention import NAME


class Attentions:
    """Those that a model had before it was offloaded, by config. Does not keep the model alive."""

    def __init__(self, model: Any) -> None:
        # sdpa: of a copy of an offloaded model, which had vattn's and was not offloaded itself
        self._before = [
            (config, "sdpa" if config._attn_implementation == NAME else config._attn_implementation)
            for config in _configs(model)
        ]
        self._changed = self._before

    def turned_on(self) -> None:
        """Remembers which configs say "vattn" now."""
        self._changed = [
            (config, name) for config, name in self._before if config._attn_implementation == NAME
        ]

    def give_back(self) -> None:
        """What was before. An attention that was set meanwhile is left alone."""
        for config, name in self._changed:
            if config._attn_implementation == NAME:
                _set(config, name)

    def turn_on_again(self) -> None:
        """After `give_back`: vattn's, but where another one was set meanwhile."""
        for config, name in self._changed:
            if config._attn_implementation == name:
                _set(config, NAME)


def _set(config: Any, name: str | None) -> None:
    config._attn_implementation = {"": name}  # its own alone: a name would go to its parts, too


def _configs(model: Any) -> list[Any]:
    """Each once: of the model, of its modules, and of the parts that a config has."""
    found: list[Any] = []
    waiting = [model.config]
    waiting += [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if any(config is other for other in found):
            continue
        found.append(config)
        parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
        waiting += [part for part in parts if part is not None]
    return found
