"""`offload`, and what it returns."""

from typing import Any, Self

import torch
from transformers import PreTrainedModel

from .._runtime import Stats, check_options
from . import _attention
from ._cache import VattnCache
from ._store import LayerStats

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


class OffloadedModel:
    """A causal language model that decodes on vattn. `model` is the model itself; until `close` its
    attention goes through this package."""

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
        self._before = model.config._attn_implementation
        self._config = model.config.get_text_config(decoder=True)
        VattnCache(self._config, options, 1)  # refuses models without a layer to offload
        model.set_attn_implementation(_attention.NAME)
        if self._config._attn_implementation != _attention.NAME:
            raise ValueError(
                f"{type(model).__name__} does not attend through transformers' AttentionInterface"
            )

    def cache(self, max_new_tokens: int = 1024) -> VattnCache:
        """An empty cache for a batch of prompts. The pool has room for max_new_tokens more tokens a
        row, unless the option host_bytes says otherwise; when it is full, FullError is raised."""
        self.last_cache = VattnCache(self._config, self.options, max_new_tokens)
        return self.last_cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with past_key_values=`cache()`: the prompt, then a token a call."""
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: VattnCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's `generate`. input_ids [rows, tokens], attention_mask alike with 0 for
        padding on the left. With past_key_values, input_ids hold everything from the first prompt
        on, and what the cache has not seen is read token by token."""
        cache = past_key_values
        if cache is None:
            cache = self.cache(self._new_tokens(input_ids.shape[1], kwargs))
        self.last_cache = cache
        seen = cache.get_seq_length(cache.store.order[0])
        if seen:
            self._read(input_ids, attention_mask, cache, seen)
        return self.model.generate(
            input_ids, attention_mask=attention_mask, past_key_values=cache, **kwargs
        )

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: VattnCache,
        seen: int,
    ) -> None:
        """Feeds all but the last of the tokens from `seen` on."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = mask.long().cumsum(1) - 1
        for i in range(seen, input_ids.shape[1] - 1):
            self.model(
                input_ids[:, i : i + 1],
                attention_mask=mask[:, : i + 1],
                position_ids=positions[:, i : i + 1],
                past_key_values=cache,
                logits_to_keep=1,
            )

    def _new_tokens(self, prompt: int, kwargs: dict[str, Any]) -> int:
        """Tokens that `generate` may add, as its arguments and the model's defaults say."""
        config = kwargs.get("generation_config") or self.model.generation_config
        new = kwargs.get("max_new_tokens") or config.max_new_tokens
        length = kwargs.get("max_length") or config.max_length
        return int(new or max(length or 0, prompt + 1024) - prompt)

    def stats(self) -> list[LayerStats]:
        """Counters by offloaded layer of the last `generate` or `cache`."""
        return [] if self.last_cache is None else self.last_cache.stats()

    def runtime_stats(self) -> Stats | None:
        """Counters of the runtime behind the last `generate` or `cache`; None before a prompt."""
        return None if self.last_cache is None else self.last_cache.runtime_stats()

    def close(self) -> None:
        """Gives the model its own attention back and frees the last cache."""
        self.model.set_attn_implementation(self._before)
        if self.last_cache is not None:
            self.last_cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def offload(model: PreTrainedModel, **options: Any) -> OffloadedModel:
    """Lets a causal language model decode from KV that vattn keeps in host memory.

    options are those of `vattn.Runtime` that are not the model's own: policy ("verified", "topk",
    "topk_uniform", "dense"), preset, epsilon, delta, norm, on_unverified, index_bytes, value_bits,
    sinks, window, exact_below, hot_share, host_bytes, num_threads, seed, profile, ... The backend
    is that of the model's device. Wrong names and types are refused here, values out of range with
    the first prompt.
    """
    return OffloadedModel(model, options)
