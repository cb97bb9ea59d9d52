"""The rows of one `generate`: a runtime, a sequence for each row of the batch, and the counters."""

from dataclasses import dataclass
from typing import Any

import torch

from .._attend import Report
from .._batch import Batch
from .._runtime import Runtime, Stats
from .._sequence import Sequence
from .._structs import Verdict

_BLOCK = 256  # tokens of one KV head and layer that the pool hands out at a time
_CALIBRATION = 512  # queries of a prompt's last tokens that calibrate the index
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class LayerStats:
    """What one layer's decode steps read, over the whole batch. A row here is a K and V row of one
    token and KV head; the middle is what is neither among the sinks nor in the window."""

    layer: int
    steps: int
    rows_middle: int  # that dense attention would have read
    rows_selected: int  # read
    rows_fetched: int  # of them not in the hot set
    looks: int  # draws, over KV heads
    exact: int  # query heads by verdict
    verified: int
    dense: int
    best_effort: int

    @property
    def selected_share(self) -> float:
        """Rows read, as a share of the middle."""
        return self.rows_selected / max(1, self.rows_middle)

    @property
    def fetched_share(self) -> float:
        """Rows fetched past the hot set, as a share of the middle."""
        return self.rows_fetched / max(1, self.rows_middle)

    @property
    def verified_share(self) -> float:
        """Query heads whose error is bounded with promise or that are exact, as a share of all."""
        return 1 - self.best_effort / max(
            1, self.exact + self.verified + self.dense + self.best_effort
        )


class Store:
    """Rows of the offloaded layers. The first prompt tells shapes, type and place."""

    def __init__(self, layers: list[bool], options: dict[str, Any], max_new_tokens: int) -> None:
        self.layers = layers  # by layer: is it offloaded
        self.order = [i for i, offloaded in enumerate(layers) if offloaded]
        self.pending: int | None = None  # layer whose new rows wait for the attention function
        self._options = options
        self._max_new_tokens = max_new_tokens
        self._runtime: Runtime | None = None
        self._sequences: list[Sequence] = []
        self._batch: Batch | None = None
        self._padding: list[int] | None = None
        self._steps = 0

    # ------------------------------------------------------------------ prompt

    def padding(self, mask: torch.Tensor | None, rows: int, tokens: int) -> list[int]:
        """Padding tokens before each row of a prompt [rows, tokens]; read from the mask once."""
        if self._padding is None:
            if mask is None:
                self._padding = [0] * rows
            elif mask.shape != (rows, tokens):
                raise ValueError(
                    f"attention_mask has shape {list(mask.shape)}, must be [{rows}, {tokens}]"
                )
            else:
                real = mask.sum(1)
                if not bool(
                    (
                        mask == (torch.arange(tokens, device=mask.device) >= tokens - real[:, None])
                    ).all()
                ):
                    raise ValueError(
                        "attention_mask has padding between or after tokens: pad on the left "
                        "(tokenizer.padding_side = 'left')"
                    )
                self._padding = (tokens - real).tolist()
            if max(self._padding) == tokens:
                raise ValueError(f"row {self._padding.index(tokens)} of the prompt has no token")
        return self._padding

    def append(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """Moves a layer's prompt into the pool. query [rows, q_heads, tokens, d], key and value
        alike with kv_heads; padding is left out."""
        if self._runtime is None:
            self._open(query, key, value, scaling)
        assert self._padding is not None
        for sequence, padding, q, k, v in zip(self._sequences, self._padding, query, key, value):
            q, k, v = (x.transpose(0, 1)[padding:] for x in (q, k, v))  # [tokens, heads, d]
            sequence.append(layer, k, v, q[-_CALIBRATION:])

    def _open(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> None:
        if key.dtype not in _DTYPES or {query.dtype, value.dtype} != {key.dtype}:
            raise ValueError(
                f"query, key and value are of {query.dtype}, {key.dtype} and {value.dtype}, must "
                "be of one type: float32, float16 or bfloat16"
            )
        assert self._padding is not None
        kv_heads, on_cuda = key.shape[1], key.device.type == "cuda"
        options: dict[str, Any] = {
            "num_layers": len(self.layers),
            "num_q_heads": query.shape[1],
            "num_kv_heads": kv_heads,
            "layer_kv_heads": [kv_heads * offloaded for offloaded in self.layers],
            "head_dim_k": key.shape[3],
            "head_dim_v": value.shape[3],
            "dtype": _DTYPES[key.dtype],
            "softmax_scale": 0.0 if scaling is None else scaling,
            "backend": "cuda" if on_cuda else "cpu",
            "device": (key.device.index or 0) if on_cuda else 0,
            "host_bytes": self._pool_bytes(key, value),
        }
        self._runtime = Runtime(**options | self._options)
        self._sequences = [self._runtime.sequence() for _ in self._padding]
        self._device = key.device
        self._counts = torch.zeros(len(self.layers), 4, dtype=torch.int64, device=key.device)
        self._verdicts = torch.zeros(
            len(self.layers) * len(Verdict), dtype=torch.int64, device=key.device
        )
        self._fill_batch()

    def _pool_bytes(self, key: torch.Tensor, value: torch.Tensor) -> int:
        """Room for the prompts, max_new_tokens more each, and the blocks that beams copy."""
        row = -(-(key.shape[3] + value.shape[3]) * key.element_size() // 128) * 128
        # Indices of other kinds take what follows from the head dimension, at most a quarter of it.
        codes = (
            max(int(self._options.get("index_bytes", 32)), key.shape[3] // 4 + 8)
            + (value.shape[3] * int(self._options.get("value_bits", 0)) + 127) // 8
        )
        assert self._padding is not None
        blocks = sum(
            -(-(key.shape[2] - padding + self._max_new_tokens) // _BLOCK) + 2
            for padding in self._padding
        )
        return blocks * len(self.order) * key.shape[1] * _BLOCK * (row + codes) + (1 << 20)

    def _fill_batch(self) -> None:
        """A batch of the sequences, and report arrays [layers, rows, heads] for a whole step."""
        assert self._runtime is not None
        rows, options = len(self._sequences), self._runtime.options
        if self._batch is None or self._batch.slots != rows:
            if self._batch is not None:
                self._batch.close()
            self._batch = self._runtime.batch(rows)
        else:
            for slot in range(rows):
                self._batch.clear(slot)
        for slot, sequence in enumerate(self._sequences):
            self._batch.set(slot, sequence)

        def zeros(heads: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(len(self.layers), rows, heads, dtype=dtype, device=self._device)

        kv_heads = options["num_kv_heads"]
        self._step = {
            "middle": zeros(kv_heads, torch.int64),
            "selected": zeros(kv_heads, torch.int32),
            "fetched": zeros(kv_heads, torch.int32),
            "looks": zeros(kv_heads, torch.int32),
            "verdict": zeros(options["num_q_heads"], torch.int32),
        }
        self._reports = [
            Report(**{name: array[layer] for name, array in self._step.items()})
            for layer in range(len(self.layers))
        ]
        # Where each verdict is counted [layers, rows, q_heads], and the ones that are added there.
        first = torch.arange(len(self.layers), device=self._device)[:, None, None] * len(Verdict)
        self._bins = first.expand_as(self._step["verdict"])
        self._ones = torch.ones(self._bins.numel(), dtype=torch.int64, device=self._device)

    # ------------------------------------------------------------------ decode

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """One new token a row: query [rows, q_heads, 1, d], its key and value ->
        [rows, 1, q_heads, d]."""
        assert self._batch is not None
        if layer == self.order[0]:
            self._batch.begin_step()
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        out: torch.Tensor = self._batch.attend(layer, q, k, v, report=self._reports[layer])
        if layer == self.order[-1]:
            self._count()
        return out

    def _count(self) -> None:
        """Adds the step's report to the counters, on the device and without waiting for it."""
        for column, name in enumerate(("middle", "selected", "fetched", "looks")):
            self._counts[:, column] += self._step[name].sum((1, 2))
        bins = self._bins + self._step["verdict"]
        self._verdicts.scatter_add_(0, bins.flatten(), self._ones)
        self._steps += 1

    # ------------------------------------------------------------------ between steps

    def select(self, rows: list[int]) -> None:
        """The batch becomes `rows` of the present one; one that is named again is forked."""
        if self._runtime is None:
            return
        before, taken, after = self._sequences, set(), []
        for row in rows:
            after.append(before[row].fork() if row in taken else before[row])
            taken.add(row)
        self._sequences = after
        self._fill_batch()
        for row, sequence in enumerate(before):
            if row not in taken:
                sequence.close()

    def rows(self) -> int:
        """Rows of the batch; 0 before the first prompt."""
        return len(self._sequences)

    def drop(self, tokens: int) -> None:
        """Takes the last `tokens` tokens off every row."""
        for sequence in self._sequences:
            sequence.truncate(sequence.length(self.order[0]) - tokens)

    def close(self) -> None:
        """Frees everything; the next prompt opens the store anew."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime, self._batch, self._sequences, self._padding = None, None, [], None
        self._steps = 0

    # ------------------------------------------------------------------ counters

    def layer_stats(self) -> list[LayerStats]:
        """Counters by offloaded layer; waits for the device."""
        if self._runtime is None:
            return []
        counts, verdicts = self._counts.tolist(), self._verdicts.view(-1, len(Verdict)).tolist()
        return [
            LayerStats(layer, self._steps, *counts[layer], *verdicts[layer]) for layer in self.order
        ]

    def runtime_stats(self) -> Stats | None:
        """Counters of the runtime; None before the first prompt."""
        return None if self._runtime is None else self._runtime.stats()
