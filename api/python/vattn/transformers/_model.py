"""`offload`, and what it returns."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Self

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .._runtime import Stats, check_options
from ._cache import VattnCache
from ._calls import (
    cache_argument,
    check_model,
    check_prompt,
    foreign_cache,
    refuse_media,
    refuse_packed,
    without_adapters,
)
from ._generate import running
from ._served import refuse_unserved
from ._store import LayerStats
from ._switch import switch_of

_OWN = (
    "num_layers",
    "num_q_heads",
    "num_kv_heads",
    "layer_kv_heads",
    "head_dim_k",
    "head_dim_v",
    "dtype",
    "shared_kv",
    "softmax_scale",
    "backend",
    "device",
)
# What an OffloadedModel has itself, beside what its class has; everything else that is read or
# set is the model's.
_ATTRIBUTES = ("model", "options", "last_cache", "_config", "_switch", "_end", "_cache_name")
# Arguments of `generate` that need what vattn does not serve.
_UNSERVED = {
    "assistant_model": "assisted decoding asks for several tokens at once",
    "prompt_lookup_num_tokens": "prompt lookup asks for several tokens at once",
    "use_mtp": "multi-token prediction asks for several tokens at once",
    "cache_implementation": "the model decodes from vattn's cache",
    "custom_generate": "what it calls the model with need not be vattn's cache",
}


class OffloadedModel:
    """A causal language model that decodes on vattn. `model` is the model itself; until `close`, or
    until this is collected, its attention goes through this package and `model.generate` is that of
    this object. What this object does not have is the model's, to read and to set: config, device,
    parameters, generation_config, ... Methods that return the model (eval, to, ...) return this."""

    def __init__(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        for name in _OWN:
            if name in options:
                raise ValueError(
                    f"{name} is {options[name]!r}, must be left out: the model's own is taken"
                )
        check_options(**options)
        self.model = model
        self.options = options
        self.last_cache: VattnCache | None = None
        self._config = model.config.get_text_config(decoder=True)
        self._cache_name = cache_argument(GenerationMixin.prepare_inputs_for_generation)
        self._switch = switch_of(model)
        self._end = weakref.finalize(self, self._switch.remove, self._switch.add(self))
        self._end.atexit = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        value = getattr(self.model, name)
        if inspect.ismethod(value) and value.__self__ is self.model:
            return self._method(value)
        return value

    def _method(self, method: Any) -> Any:
        """A method of the model, which returns this where it returns the model."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self.model else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ATTRIBUTES or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            object.__delattr__(self, name)
        else:
            delattr(self.model, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.model)})

    def __repr__(self) -> str:
        state = "closed" if not self._end.alive else f"options {self.options}"
        return f"<vattn.transformers.OffloadedModel of {type(self.model).__name__}, {state}>"

    def _check_open(self) -> None:
        if not self._end.alive:
            raise RuntimeError(
                "this offloaded model is closed: use the model itself, or offload it again"
            )

    def _check_on(self) -> None:
        self._check_open()
        why = self._switch.why_off()
        if why is not None:
            raise RuntimeError(why)

    def cache(self, max_new_tokens: int = 1024) -> VattnCache:
        """An empty cache for a batch of prompts. The pool has room for max_new_tokens more tokens a
        row, unless the option host_bytes says otherwise; when it is full, FullError is raised."""
        self._check_open()
        self.last_cache = VattnCache(self._config, self.options, max_new_tokens)
        self.last_cache.model = weakref.ref(without_adapters(self.model))
        self.last_cache.switch = self._switch
        return self.last_cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. With cache=`cache()`: the prompt, then a token a call."""
        self._check_on()
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As the model's `generate`, with its arguments: ids [rows, tokens] as inputs or input_ids,
        or all that a tokenizer returns; attention_mask alike with 0 for padding; or inputs_embeds.

        With a `cache` that holds tokens, ids hold everything from the first prompt on, or what is
        new alone if attention_mask covers all. Tokens that the cache holds and ids do not, because
        the history was edited, are taken off and read again. New tokens are read together, on CUDA
        one by one.

        output_attentions and use_cache=False need the model's own attention: they run on it, with
        nothing offloaded and a warning. NotImplementedError: assisted decoding and other modes that
        ask for several tokens at once, and custom_generate.
        """
        self._check_on()
        if isinstance(inputs, Mapping):
            inputs, kwargs = None, dict(inputs) | kwargs
        if isinstance(generation_config, torch.Tensor):
            raise TypeError("generation_config is a Tensor: give attention_mask by its name")
        if generation_config is not None:
            if not isinstance(generation_config, GenerationConfig):
                raise TypeError(
                    f"generation_config is a {type(generation_config).__name__}, must be a "
                    "GenerationConfig (its settings are arguments of generate, too)"
                )
            kwargs["generation_config"] = generation_config
        cache = self._given_cache(kwargs)
        if inputs is not None:
            name = getattr(self.model, "main_input_name", "input_ids")
            if kwargs.get(name) is not None:
                raise ValueError(f"inputs and {name} are both given, must be one of them")
            kwargs[name] = inputs
        check_prompt(kwargs)
        if self._needs_own_attention(kwargs):
            return self._generate_stock(cache, kwargs)
        self._refuse(kwargs)
        if cache is None:
            cache = self.cache(self._new_tokens(kwargs))
        self.last_cache = cache
        cache.settle()
        held = self._continue(cache, kwargs) if cache.get_seq_length() else 0
        (refuse_media if cache.get_seq_length() else refuse_packed)(kwargs)
        rows = self._prompt(kwargs)
        cache.real_from = held + (1 if rows is None else rows.shape[1])
        if self._setting("cache_implementation", kwargs) is not None:
            kwargs["cache_implementation"] = None  # the model's habit, which a cache replaces
        cache.last_logits_do = True
        try:
            with running(self.model):
                return self._own_generate(**kwargs | {self._cache_name: cache})
        finally:
            cache.last_logits_do, cache.real_from = False, None

    def _own_generate(self, **kwargs: Any) -> Any:
        """The model's own `generate`: an attribute that it has of that name, else its class's."""
        attribute = self._switch.attribute()
        if attribute is None:
            return type(self.model).generate(self.model, **kwargs)
        result = attribute(**kwargs)
        cache = kwargs.get(self._cache_name)
        if cache is not None and cache.get_seq_length() == 0:
            raise RuntimeError(
                f"the `generate` that was set on this {type(self.model).__name__} read nothing with "
                f"the {self._cache_name} that it was given, so nothing was offloaded: must hand it "
                "on, or be deleted"
            )
        return result

    # ------------------------------------------------------------------ arguments of generate

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting of `generate`: an argument, or in the config given, or in the model's."""
        value = kwargs.get(name)
        for place in (kwargs.get("generation_config"), self.model.generation_config):
            if value is None and place is not None:
                value = getattr(place, name, None)
        return value

    def _given_cache(self, kwargs: dict[str, Any]) -> VattnCache | None:
        given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        caches = [cache for cache in given if cache is not None]
        if len(caches) == 2 and caches[0] is not caches[1]:
            raise ValueError("cache and past_key_values are both given, must be one of them")
        if caches and not isinstance(caches[0], VattnCache):
            raise foreign_cache(caches[0])
        if caches:
            check_model(caches[0], self.model)
        return caches[0] if caches else None

    def _needs_own_attention(self, kwargs: dict[str, Any]) -> bool:
        asked = getattr(self.model.config, "output_attentions", False)
        if self._setting("output_attentions", kwargs) or asked:
            reason = "output_attentions is True, and vattn has no attention weights to hand out"
        elif self._setting("use_cache", kwargs) is False and kwargs.get("inputs_embeds") is None:
            reason = "use_cache is False, which leaves no KV to offload"
        else:
            return False
        warnings.warn(
            f"{reason}: this call runs on the model's own attention, with nothing offloaded",
            stacklevel=4,
        )
        return True

    def _generate_stock(self, cache: VattnCache | None, kwargs: dict[str, Any]) -> Any:
        if cache is not None:
            raise ValueError(
                "cache is given, must be left out: with output_attentions or without use_cache the "
                "call runs on the model's own attention, which cannot read it"
            )
        with running(self.model), self._switch.own_attention():
            return self._own_generate(**kwargs)

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        for name, reason in _UNSERVED.items():
            value = kwargs.get(name)
            if value is None and kwargs.get("generation_config") is not None:
                value = getattr(kwargs["generation_config"], name, None)
            if value:
                named = getattr(value, "__name__", type(value).__name__)
                shown = named if callable(value) else repr(value)
                raise NotImplementedError(f"{name} is {shown}, must be left out: {reason}")
        scale = self._setting("guidance_scale", kwargs)
        if scale is not None and scale != 1:
            raise NotImplementedError(
                f"guidance_scale is {scale!r}, must be left out: the text that it is measured against "
                "is decoded from a cache of its own, which is not vattn's"
            )
        rows, mask = self._prompt(kwargs), kwargs.get("attention_mask")
        if rows is not None and 0 in rows.shape[:2]:
            raise ValueError(f"the prompt is {list(rows.shape)}, must have a row and a token")
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask has padding after the last token: pad on the left "
                "(tokenizer.padding_side = 'left')"
            )

    def _prompt(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """What is read: embeddings [rows, tokens, d], else ids [rows, tokens], else nothing."""
        rows = kwargs.get("inputs_embeds")
        return kwargs.get("input_ids") if rows is None else rows

    def _new_tokens(self, kwargs: dict[str, Any]) -> int:
        """Tokens that `generate` may add, as its arguments and the model's defaults say."""
        rows, ids = self._prompt(kwargs), kwargs.get("input_ids")
        prompt = 1 if rows is None else rows.shape[1]
        new = self._setting("max_new_tokens", kwargs)
        length = self._setting("max_length", kwargs)
        if new is None and length is not None:
            new = length if ids is None else length - ids.shape[1]
        return max(1, int(new if new is not None else max(1024, prompt // 8)))

    def _continue(self, cache: VattnCache, kwargs: dict[str, Any]) -> int:
        """Brings a cache that holds tokens and the arguments together: what the two have in common
        stays, at least one token is left to read. Returns how many tokens come before the first
        that the arguments have."""
        history, rows = cache.history, self._prompt(kwargs)
        assert history is not None
        if rows is None:
            raise ValueError("input_ids are left out, must be given: the cache holds tokens")
        held, mask = history.tokens, kwargs.get("attention_mask")
        repeats = max(
            int(self._setting(name, kwargs) or 1) for name in ("num_beams", "num_return_sequences")
        )
        if repeats > 1 and history.rows == rows.shape[0]:
            cache.batch_repeat_interleave(repeats)
        elif history.rows != rows.shape[0] * repeats:
            raise ValueError(
                f"the prompt has {rows.shape[0]} rows, the cache {history.rows}: must be as many"
            )
        new_alone = mask is not None and mask.shape[1] != rows.shape[1]
        if kwargs.get("inputs_embeds") is not None:
            if rows.shape[1] <= held:
                raise ValueError(
                    f"inputs_embeds have {rows.shape[1]} tokens, must have more than the {held} "
                    "that the cache holds: they hold everything from the first prompt on"
                )
        elif not new_alone:
            if mask is None:
                mask = kwargs["attention_mask"] = self._mask_of(rows, kwargs)
            many = None if mask is None else mask.repeat_interleave(repeats, 0)
            agree = history.agree(rows.repeat_interleave(repeats, 0), many)
            try:
                cache.crop(min(agree, rows.shape[1] - 1, held) - held)
            except RuntimeError:  # layers of transformers that cannot go back: all is read again
                cache.reset()
        if (new_alone or kwargs.get("inputs_embeds") is not None) and mask is not None:
            wanted = mask[:, :held].bool().repeat_interleave(repeats, 0)
            if not torch.equal(wanted.to(history.real.device), history.real):
                raise ValueError(
                    "attention_mask differs from the one that the cache's tokens were read with"
                )
        return held if new_alone else 0

    def _mask_of(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The mask that transformers takes ids to have when none is given: pad tokens are padding,
        unless they may end a text too. None: no padding."""
        pad, end = (self._setting(name, kwargs) for name in ("pad_token_id", "eos_token_id"))
        ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
        if pad is None or int(pad) in ends or not bool((ids == int(pad)).any()):
            return None
        return (ids != int(pad)).long()

    # ------------------------------------------------------------------ counters

    def stats(self) -> list[LayerStats]:
        """Counters by offloaded layer of the last `generate` or `cache`."""
        return [] if self.last_cache is None else self.last_cache.stats()

    def runtime_stats(self) -> Stats | None:
        """Counters of the runtime behind the last `generate` or `cache`; None before a prompt."""
        return None if self.last_cache is None else self.last_cache.runtime_stats()

    def close(self) -> None:
        """Frees the last cache, and gives the model its own attention back if no other wrap of it
        is open."""
        self._end()
        if self.last_cache is not None:
            self.last_cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("an OffloadedModel cannot be pickled or copied: offload the copy instead")


def offload(model: PreTrainedModel, **options: Any) -> OffloadedModel:
    """Lets a causal language model decode from KV that vattn keeps in host memory.

    options are those of `vattn.Runtime` that are not the model's own: policy ("verified", "topk",
    "topk_uniform", "dense"), preset, epsilon, delta, norm, on_unverified, index_bytes, value_bits,
    sinks, window, exact_below, hot_share, host_bytes, num_threads, seed, profile, ... The backend
    is that of the model's device. Wrong names and types are refused here, values out of range with
    the first prompt; models that are not served are refused here too, with what they have that
    vattn does not serve. Keep the result: the model is offloaded as long as it lives.
    """
    refuse_unserved(model)
    return OffloadedModel(model, options)
