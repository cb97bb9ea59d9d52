"""A transformers Cache whose full-attention layers keep their rows in vattn."""

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .._runtime import Stats
from ._history import History
from ._served import offloaded
from ._store import LayerStats, Store

if TYPE_CHECKING:
    from ._switch import Switch


class OffloadedLayer(CacheLayerMixin):
    """One layer of the cache: counts tokens, and hands new rows on to the attention function."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: "VattnCache", index: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # which has the layer: together they end with it
        self.index = index
        self.tokens = 0  # padding included, as transformers counts
        self.is_initialized = True

    @property
    def cache(self) -> "VattnCache":
        """The cache that this is a layer of."""
        cache = self._cache()
        assert cache is not None
        return cache

    @property
    def store(self) -> Store:
        """The rows of all layers."""
        return self.cache.store

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the store opens itself when it sees a prompt."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new rows as they are. They carry their layer, for the attention function."""
        if self.store.pending is not None:
            raise self.cache.keys_lost(self.store.pending)
        self.store.pending = self.index
        key_states.vattn_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def offload(self) -> None:
        """Nothing to do: the rows are in host memory."""

    def prefetch(self) -> None:
        """Nothing to do: what a step reads is fetched by it."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset)."""
        return self.cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self.tokens

    def get_max_length(self) -> int:
        """No maximum but the pool's."""
        return -1


class VattnCache(Cache):
    """KV of one batch of prompts and what is generated from them. `OffloadedModel.cache` makes it.

    May be passed as the cache to `generate` and to the model itself: the prompt in one call, then
    one token a call, or several, which then attend exactly (on CUDA not of float32 or with heads
    over 256). A call that is interrupted or fails leaves it as it was before. `copy` and `deepcopy`
    fork every row: copies share the pool, and the rows that they have in common, until
    one of them writes. `close` frees what it holds at once; collection does it too.
    """

    def __init__(
        self, config: PreTrainedConfig, options: dict[str, Any], max_new_tokens: int
    ) -> None:
        layers = DynamicCache(config=config).layers
        ours = offloaded(config)
        self.store = Store(ours, options, max_new_tokens)
        self.model: weakref.ref[Any] | None = None  # whose rows it takes; None: any model's
        self.switch: Switch | None = None  # of that model
        self.history: History | None = None  # from the first prompt on
        self.last_logits_do = False  # the caller of the forward wants the last token's logits alone
        self.real_from: int | None = None  # columns from here on are known to be no padding
        self._expected: torch.Tensor | None = None  # ids of the forward that comes
        self._reset_counts()
        super().__init__(
            layers=[OffloadedLayer(self, i) if ours[i] else old for i, old in enumerate(layers)]
        )
        # Layers that are given keys: a forward is over when the last of them has attended.
        self._keyed = [i for i, layer in enumerate(self.layers) if _takes_keys(layer)]

    def _reset_counts(self) -> None:
        self._tokens = 0  # of calls that were completed
        self._last = -1  # layer that the present call, or one that was interrupted, came to
        self._before: dict[int, dict[str, Any]] = {}  # other layers as they were before the call

    def _kinds(self) -> tuple[list[OffloadedLayer], list[Any]]:
        ours = [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]
        return ours, [layer for layer in self.layers if not isinstance(layer, OffloadedLayer)]

    # ------------------------------------------------------------------ calls of the model

    def expect(self, ids: torch.Tensor | None) -> None:
        """Tells which tokens the next forward has [rows, tokens]; None: embeddings."""
        self._expected = ids

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held, padding included: of calls that were completed."""
        return self._tokens

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a layer's new rows."""
        if self.store.pending is None and layer_idx <= self._last:
            self.settle()
        if self._last < 0:
            self._begin(key_states.shape[0], key_states.shape[2])
        out: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        self._last = layer_idx
        if not isinstance(self.layers[layer_idx], OffloadedLayer):
            self.done(layer_idx, key_states.shape[2])
        return out

    def _begin(self, rows: int, tokens: int) -> None:
        why = None if self.switch is None else self.switch.why_off()
        if why is not None:
            raise RuntimeError(why)
        if self._tokens and tokens > 1 and not self.store.reads_chunks():
            raise NotImplementedError(
                f"{tokens} tokens at once after the prompt: of float32 rows, and of heads over 256, "
                "vattn reads one token a call on CUDA "
                "(the wrapped model's generate feeds them so)"
            )
        if self.history is not None and self.history.rows != rows:
            raise ValueError(f"the call has {rows} rows, must have the cache's {self.history.rows}")
        self._before = {
            i: dict(layer.__dict__)
            for i, layer in enumerate(self.layers)
            if not isinstance(layer, OffloadedLayer)
        }

    def begin(self, mask: torch.Tensor | None, rows: int, tokens: int, device: Any) -> None:
        """The first offloaded layer of a call attends: mask [rows, all tokens] is looked at."""
        if self.history is None:
            self.history = History(rows, device)
        real = self._new_tokens(mask, rows, tokens)
        ids, self._expected = self._expected, None
        known = ids is not None and ids.shape == (rows, tokens)
        self.history.add(ids if known else None, real, tokens)
        self.store.open_call(self.history, tokens, real)

    def _new_tokens(
        self, mask: torch.Tensor | None, rows: int, tokens: int
    ) -> torch.Tensor | None:
        """Which new tokens are no padding [rows, tokens]; None: all. Refuses a mask that says
        something else of the tokens before than the masks before did."""
        assert self.history is not None
        before = self.history.tokens
        if self.real_from is not None and before >= self.real_from:
            return None
        if mask is None:
            if self.history.padded:
                raise ValueError(
                    "attention_mask is left out, must be given: rows of the cache have padding"
                )
            return None
        if tuple(mask.shape) != (rows, before + tokens):
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, must be [{rows}, {before + tokens}]"
            )
        mask = mask.bool()
        if self.real_from is None and before:
            if not torch.equal(mask[:, :before], self.history.real.to(mask.device)):
                column = int((mask[:, :before] != self.history.real).any(0).nonzero()[0])
                raise ValueError(
                    f"attention_mask differs at token {column} from the one that the token was "
                    "read with: tokens in the cache cannot be hidden, nor padding shown"
                )
        new = mask[:, before:]
        return None if bool(new.all()) else new

    def done(self, layer: int, tokens: int) -> None:
        """A layer has taken the call's tokens; the last one ends the call."""
        if layer == self._keyed[-1]:
            self._tokens += tokens
            self._last, self._before = -1, {}

    def check_done(self) -> None:
        """After a call that returned: raises if a layer took keys and did not attend with them, or
        if a layer that should have took none."""
        if self.store.pending is not None:
            raise self.keys_lost(self.store.pending)
        if self._last >= 0:
            raise RuntimeError(
                f"layer {self._keyed[self._keyed.index(self._last) + 1]} of the cache was given no "
                "keys: this model does not keep the layers that its config tells of"
            )

    def keys_lost(self, layer: int) -> RuntimeError:
        """The error for a model that attends with other tensors than its cache handed out."""
        why = None if self.switch is None else self.switch.why_off()
        return RuntimeError(
            why
            or f"layer {layer} has not attended through vattn: the model does not hand the keys of "
            "its cache to its attention function"
        )

    # ------------------------------------------------------------------ between calls

    def settle(self) -> None:
        """Undoes what a call that was interrupted left behind."""
        self._expected = None
        if self._last < 0 and self.store.pending is None:
            return
        if self._tokens == 0:
            self.reset()
            return
        for layer, state in self._before.items():
            if isinstance(self.layers[layer], LinearAttentionCacheLayerMixin):
                raise RuntimeError(
                    f"a call was interrupted, and layer {layer} keeps a state that cannot go back "
                    "a token: reset the cache, or close it"
                )
            self.layers[layer].__dict__.clear()
            self.layers[layer].__dict__.update(state)
        assert self.history is not None
        self.history.cut(self._tokens)
        self.store.abandon(self.history.lengths(self._tokens))
        for ours in self._kinds()[0]:
            ours.tokens = self._tokens
        self._last, self._before = -1, {}

    def select(self, rows: list[int]) -> None:
        """The batch becomes `rows` of the present one; one that is named again is forked."""
        self.settle()
        if self.history is None:
            return
        self.store.select(rows)
        self.history.select(rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes row beam_idx[i] of the present batch."""
        self.select(beam_idx.tolist())
        for layer in self._kinds()[1]:
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows, given by number or by a mask."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.select(chosen.tolist())
        for layer in self._kinds()[1]:
            layer.batch_select_indices(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.settle()
        rows = 0 if self.history is None else self.history.rows
        self.select([row for row in range(rows) for _ in range(repeats)])
        for layer in self._kinds()[1]:
            layer.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes -tokens_to_remove tokens off the end of every row. Those that an interrupted call
        left in some of the layers count as the last ones."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}, must be 0 or negative")
        ours, others = self._kinds()
        most = max(layer.tokens for layer in ours)
        self.settle()
        keep = max(0, min(self._tokens, most + tokens_to_remove))
        if keep == self._tokens:
            return
        if keep == 0:
            self.reset()
            return
        assert self.history is not None
        before = [dict(other.__dict__) for other in others]
        try:
            for other in others:  # first: a sliding window that is full cannot go back
                other.crop(keep - self._tokens)
        except BaseException:
            for other, state in zip(others, before):
                other.__dict__.update(state)
            raise
        self.history.cut(keep)
        self.store.truncate(self.history.lengths(keep))
        for layer in ours:
            layer.tokens = keep
        self._tokens = keep

    def reset(self) -> None:
        """Forgets every token; the next call is a prompt."""
        self.store.close()
        self.history = self._expected = None
        self._reset_counts()
        ours, others = self._kinds()
        for layer in ours:
            layer.tokens = 0
        for other in others:
            other.reset()

    def close(self) -> None:
        """Frees what it holds of the pool. The cache is empty then: the next call is a prompt."""
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "VattnCache":
        self.settle()
        other: VattnCache = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(self.__dict__)
        other.store = self.store.fork()
        other.history = None if self.history is None else self.history.copy()
        other._before = {}
        other.layers = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, OffloadedLayer):
                twin = OffloadedLayer(other, i)
                twin.tokens = layer.tokens
                other.layers.append(twin)
            else:
                other.layers.append(copy.deepcopy(layer, memo))
        return other

    def __copy__(self) -> "VattnCache":
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        raise TypeError("a VattnCache cannot be pickled: its rows are in vattn's pool")

    # ------------------------------------------------------------------ counters

    def stats(self) -> list[LayerStats]:
        """Counters by offloaded layer since the prompt; waits for the device."""
        return self.store.layer_stats()

    def runtime_stats(self) -> Stats | None:
        """Counters of the runtime behind it, bytes among them; None before the first prompt."""
        return self.store.runtime_stats()


def _takes_keys(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin)
