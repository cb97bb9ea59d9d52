"""One dense prefill, and any number of policies that decode from its keys and values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import vattn.transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from vattn.transformers import VattnCache

_RECORD = "vattn_quality_record"
_CALIBRATION = 512  # queries of a prompt's last tokens that the adapter passes on
Tensors = list[torch.Tensor]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    recorded: "Queries | None" = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention that leaves its queries [1, q_heads, tokens, d] in `recorded`."""
    if recorded is not None:
        recorded.by_layer.append(query[0, :, -recorded.most :].clone())
        recorded.scaling = scaling
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )


AttentionInterface.register(_RECORD, _attention)
AttentionMaskInterface.register(_RECORD, sdpa_mask)


class Queries:
    """Post-RoPE queries of a forward pass's last `most` tokens, [q_heads, tokens, d] by layer."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.by_layer: Tensors = []
        self.scaling: float | None = None


@dataclass
class Tail:
    """What tokens after a context add to its rows, by layer: keys and values [kv_heads, tokens, d],
    queries alike by query head; and the token after them, from which decoding goes on."""

    tokens: int
    keys: Tensors
    values: Tensors
    queries: Tensors
    next: int


class Context:
    """A prompt's common part after a dense prefill."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: list[int]) -> None:
        """ids [tokens]."""
        self.model, self.tokens = model, len(ids)
        self.cache = DynamicCache(config=model.config)
        self.queries = Queries(2 * _CALIBRATION)
        self._forward(ids, self.queries)

    def _forward(self, ids: list[int], queries: Queries) -> None:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(_RECORD)
        try:
            self.model(
                torch.tensor([ids], device=self.model.device),
                past_key_values=self.cache,
                logits_to_keep=1,
                recorded=queries,
            )
        finally:
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def extend(self, ids: list[int]) -> Tail:
        """Reads ids [2 or more] but for the last one after the context, dense; forgets them."""
        queries = Queries(len(ids))
        self._forward(ids[:-1], queries)
        keys, values = [], []
        for layer in self.cache.layers:
            keys.append(layer.keys[0, :, self.tokens :].clone())
            values.append(layer.values[0, :, self.tokens :].clone())
            layer.keys = layer.keys[:, :, : self.tokens]
            layer.values = layer.values[:, :, : self.tokens]
        return Tail(len(ids) - 1, keys, values, queries.by_layer, ids[-1])


@dataclass
class Row:
    """A context and what follows it: one row of a batch."""

    context: Context
    tail: Tail

    @property
    def tokens(self) -> int:
        """Tokens that have been read before decoding."""
        return self.context.tokens + self.tail.tokens

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(queries of the last tokens, keys, values) of layer i, each [heads, tokens, d]."""
        held = self.context.cache.layers[i]
        return (
            torch.cat([self.context.queries.by_layer[i], self.tail.queries[i]], 1),
            torch.cat([held.keys[0], self.tail.keys[i]], 1),
            torch.cat([held.values[0], self.tail.values[i]], 1),
        )


def _left(parts: Tensors, length: int) -> torch.Tensor:
    """Parts [heads, tokens, d] cut or padded on the left to [rows, heads, length, d]."""
    out = parts[0].new_zeros(len(parts), parts[0].shape[0], length, parts[0].shape[2])
    for row, part in enumerate(parts):
        taken = min(length, part.shape[1])
        out[row, :, length - taken :] = part[:, part.shape[1] - taken :]
    return out


def fill(cache: VattnCache, rows: list[Row]) -> None:
    """Moves what the rows have read into an empty cache, as the adapter moves a prompt."""
    longest = max(row.tokens for row in rows)
    lengths = torch.tensor([row.tokens for row in rows])
    mask = torch.arange(longest) >= longest - lengths[:, None]
    cache.begin(mask, len(rows), longest, rows[0].context.model.device)
    cache.real_from = longest  # the steps come without a mask: their tokens are no padding
    # append leaves out a row's padding of the queries, too.
    padding = longest - int(lengths.min())
    recent = min(_CALIBRATION, longest - padding) + padding
    for i, layer in enumerate(cache.layers):
        queries, keys, values = (
            _left(list(x), length)
            for x, length in zip(zip(*(row.layer(i) for row in rows)), (recent, longest, longest))
        )
        cache.store.append(i, queries, keys, values, rows[0].context.queries.scaling)
        layer.tokens = longest
        cache.done(i, longest)


def dense_cache(rows: list[Row]) -> DynamicCache:
    """The rows, all of one length, in transformers' own cache."""
    cache = DynamicCache(config=rows[0].context.model.config)
    for i in range(len(cache.layers)):
        _, keys, values = zip(*(row.layer(i) for row in rows))
        cache.update(torch.stack(keys), torch.stack(values), i)
    return cache


class Decoder:
    """Steps of a batch of rows, with one cache. Closed with `with`."""

    def __init__(self, rows: list[Row], options: dict[str, Any] | None, steps: int) -> None:
        """options are those of vattn.transformers.offload; None: transformers' own cache."""
        self._model = rows[0].context.model
        self._position = torch.tensor([[row.tokens] for row in rows], device=self._model.device)
        self.first = torch.tensor([row.tail.next for row in rows], device=self._model.device)
        self._wrapped = None
        if options is None:
            self._cache: Any = dense_cache(rows)
        else:
            self._wrapped = vattn.transformers.offload(self._model, **options)
            try:
                self._cache = self._wrapped.cache(steps)
                fill(self._cache, rows)
            except BaseException:
                self._wrapped.close()
                raise

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens [rows] that come next -> logits [rows, words] after them."""
        out = self._model(
            tokens[:, None], position_ids=self._position, past_key_values=self._cache
        ).logits
        self._position = self._position + 1
        logits: torch.Tensor = out[:, -1].float()
        return logits

    def stats(self) -> vattn.Stats:
        """Counters of the rows' runtime."""
        return self._cache.runtime_stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._wrapped is not None:
            self._wrapped.close()


def greedy(decoder: Decoder, steps: int, ends: set[int]) -> list[list[int]]:
    """The most likely tokens, by row, up to an end token or `steps`."""
    tokens, answers = decoder.first, []
    over = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(steps):
        tokens = decoder.step(tokens).argmax(1)
        answers.append(tokens)
        over |= torch.isin(tokens, torch.tensor(sorted(ends), device=tokens.device))
        if bool(over.all()):
            break
    rows = torch.stack(answers, 1).tolist()
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


def forced(decoder: Decoder, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits [rows, words] of each of ids [rows, steps], which are what comes next whatever the
    logits say."""
    tokens = decoder.first
    for step in range(ids.shape[1]):
        yield decoder.step(tokens)
        tokens = ids[:, step]
