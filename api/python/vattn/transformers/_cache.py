"""A transformers Cache whose full-attention layers keep their rows in vattn."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .._runtime import Stats
from ._store import LayerStats, Store


class OffloadedLayer(CacheLayerMixin):
    """One layer of the cache: counts tokens, and hands new rows on to the attention function."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: Store, index: int) -> None:
        super().__init__()
        self.store = store
        self.index = index
        self.tokens = 0  # padding included, as transformers counts
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the store opens itself when it sees a prompt."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new rows as they are. They carry their layer, for the attention function."""
        if self.store.pending is not None:
            raise RuntimeError(
                f"layer {self.store.pending} has not attended through vattn: this model does "
                "not hand the keys of its cache to its attention function"
            )
        self.store.pending = self.index
        key_states.vattn_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset)."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """No maximum but the pool's."""
        return -1


class VattnCache(Cache):
    """KV of one batch of prompts and what is generated from them. `OffloadedModel.cache` makes it.

    May be passed as past_key_values to `generate` and to the model itself: the prompt in one call,
    then one token a call. `close` frees the pool at once; collection does it too.
    """

    def __init__(
        self, config: PreTrainedConfig, options: dict[str, Any], max_new_tokens: int
    ) -> None:
        layers = DynamicCache(config=config).layers
        offloaded = [type(layer) is DynamicLayer for layer in layers]
        if not any(offloaded):
            raise ValueError(
                f"{type(config).__name__} has no layer of plain full attention to offload"
            )
        self.store = Store(offloaded, options, max_new_tokens)
        super().__init__(
            layers=[
                OffloadedLayer(self.store, i) if offloaded[i] else layer
                for i, layer in enumerate(layers)
            ]
        )

    def _kinds(self) -> tuple[list[OffloadedLayer], list[Any]]:
        ours = [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]
        return ours, [layer for layer in self.layers if not isinstance(layer, OffloadedLayer)]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row beam_idx[i] of the present batch."""
        self.store.select(beam_idx.tolist())
        for layer in self._kinds()[1]:
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows, given by number or by a mask."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.store.select(chosen.tolist())
        for layer in self._kinds()[1]:
            layer.batch_select_indices(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        rows = self.store.rows()
        self.store.select([row for row in range(rows) for _ in range(repeats)])
        for layer in self._kinds()[1]:
            layer.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes -tokens_to_remove tokens off the end of every row."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, must be 0 or negative")
        ours, others = self._kinds()
        if tokens_to_remove < 0:
            self.store.drop(-tokens_to_remove)
        for layer in ours:
            layer.tokens += tokens_to_remove
        for other in others:
            other.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forgets every token; the next call is a prompt."""
        self.close()
        ours, others = self._kinds()
        for layer in ours:
            layer.tokens = 0
        for other in others:
            other.reset()

    def close(self) -> None:
        """Frees the pool."""
        self.store.close()

    def stats(self) -> list[LayerStats]:
        """Counters by offloaded layer since the prompt; waits for the device."""
        return self.store.layer_stats()

    def runtime_stats(self) -> Stats | None:
        """Counters of the runtime behind it, bytes among them; None before the first prompt."""
        return self.store.runtime_stats()
