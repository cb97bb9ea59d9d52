"""The rows of one `generate`: a runtime, a sequence for each row of the batch, and the counters."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from .._attend import Report
from .._batch import Batch
from .._enums import DType
from .._runtime import Runtime, Stats
from .._sequence import Sequence
from .._structs import Verdict
from ._history import History

_BLOCK = 256  # tokens of one KV head and layer that the pool hands out at a time
_CALIBRATION = 512  # queries of a prompt's last tokens that calibrate the index
_CHUNK = 65536  # tokens of one `Sequence.prefill`
_CUDA_HEAD_DIM = 256  # the largest of it on CUDA, where rows of float32 are not served
_HEAD_DIM = 16  # the library's head dimensions are multiples of it; zeros fill what is missing
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


class _Pool:
    """A runtime, and the stores that have rows in it: a store's copies share its runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.stores: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """Rows of the offloaded layers. The first prompt tells shapes, type and place."""

    def __init__(self, layers: list[bool], options: dict[str, Any], max_new_tokens: int) -> None:
        self.layers = layers  # by layer: is it offloaded
        self.order = [i for i, offloaded in enumerate(layers) if offloaded]
        self.pending: int | None = None  # layer whose new rows wait for the attention function
        self._options = options
        self._max_new_tokens = max_new_tokens
        self._pool: _Pool | None = None
        self._sequences: list[Sequence] = []
        self._batch: Batch | None = None
        # Tokens of a prompt or chunk by row, padding left out: a slice where it can be one.
        self.chosen: list[slice | torch.Tensor] = []
        self._lengths: list[int] = []
        self._absent: list[int] = []  # rows that have padding in place of the step's token
        self._scale = 1.0  # of the logits, in the runtime's options; layers may have others
        self._steps = 0

    # ------------------------------------------------------------------ calls

    def open_call(self, history: History, tokens: int, real: torch.Tensor | None) -> None:
        """A call of the model begins: its tokens are the last ones of `history`, those that are no
        padding are marked in real [rows, tokens]; None: all of them."""
        self._absent = []
        if history.tokens > tokens and tokens == 1:
            marks = [] if real is None else real[:, 0].tolist()
            self._absent = [row for row, mark in enumerate(marks) if not mark]
            return
        if history.tokens == tokens:
            self._lengths = history.lengths(tokens)
            for row, length in enumerate(self._lengths):
                if length == 0:
                    raise ValueError(f"row {row} of the prompt has no token")
        self.chosen = [slice(0, tokens)] * history.rows
        if real is not None:
            self.chosen = [_chosen(marks) for marks in real]

    # ------------------------------------------------------------------ prompt

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
        if self._pool is None:
            self._open(query, key, value, _scale(query, scaling))
        query = self.scaled(query, scaling)
        for sequence, tokens, *rows in zip(self._sequences, self.chosen, query, key, value):
            q, k, v = (_padded(x.transpose(0, 1)[tokens]) for x in rows)  # [tokens, heads, d]
            sequence.append(layer, k, v, q[-_CALIBRATION:])

    def reads_chunks(self) -> bool:
        """Whether several tokens after the prompt can be read in one call, `prefill`."""
        if self._pool is None:
            return False
        options = self._pool.runtime.options
        small = max(options["head_dim_k"], options["head_dim_v"]) <= _CUDA_HEAD_DIM
        return self._device.type == "cpu" or (options["dtype"] != DType.F32 and small)

    def prefill(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Several tokens a row after the prompt, each of which sees those before it: query [rows,
        q_heads, tokens, d] as `scaled` gives it, key and value alike -> [rows, tokens, q_heads, d];
        zeros for padding."""
        out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        for row, (sequence, tokens) in enumerate(zip(self._sequences, self.chosen)):
            q, k, v = (_padded(x[row].transpose(0, 1)[tokens]) for x in (query, key, value))
            answers = [
                sequence.prefill(layer, *(x[begin : begin + _CHUNK] for x in (q, k, v)))
                for begin in range(0, q.shape[0], _CHUNK)
            ]
            if answers:
                out[row, tokens] = torch.cat(answers)[..., : value.shape[3]]
        return out

    def scaled(self, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Queries that give, with the runtime's scale, the logits of a layer that has its own."""
        own = _scale(query, scaling)
        return query if own == self._scale else query * (own / self._scale)

    def _open(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> None:
        if key.dtype not in _DTYPES or {query.dtype, value.dtype} != {key.dtype}:
            raise ValueError(
                f"query, key and value are of {query.dtype}, {key.dtype} and {value.dtype}, must "
                "be of one type: float32, float16 or bfloat16"
            )
        on_cuda = key.device.type == "cuda"
        options = _shape_options(self.layers, query, key, value, scale)
        dims = [options["head_dim_k"], options["head_dim_v"]]
        options |= {
            "backend": "cuda" if on_cuda else "cpu",
            "device": (key.device.index or 0) if on_cuda else 0,
            "host_bytes": self._pool_bytes(key.shape[1], dims, key.element_size()),
        }
        self._pool = _Pool(Runtime(**options | self._options))
        self._pool.stores.add(self)
        self._scale = scale
        self._sequences = [self._pool.runtime.sequence() for _ in self._lengths]
        self._device = key.device
        self._start_counting()
        self._fill_batch()

    def _start_counting(self) -> None:
        self._steps = 0
        self._counts = torch.zeros(len(self.layers), 4, dtype=torch.int64, device=self._device)
        self._verdicts = torch.zeros(
            len(self.layers) * len(Verdict), dtype=torch.int64, device=self._device
        )

    def _pool_bytes(self, kv_heads: int, dims: list[int], element: int) -> int:
        """Room for the prompts, max_new_tokens more each, and the blocks that beams copy."""
        row = -(-sum(dims) * element // 128) * 128
        # Indices of other kinds take what follows from the head dimension, at most a quarter of it.
        codes = (
            max(int(self._options.get("index_bytes", 32)), dims[0] // 4 + 8)
            + (dims[1] * int(self._options.get("value_bits", 0)) + 127) // 8
        )
        blocks = sum(
            -(-(length + self._max_new_tokens) // _BLOCK) + 2 for length in self._lengths
        )
        return blocks * len(self.order) * kv_heads * _BLOCK * (row + codes) + (1 << 20)

    def _fill_batch(self) -> None:
        """A batch of the sequences, and report arrays [layers, rows, heads] for a whole step."""
        assert self._pool is not None
        rows, options = len(self._sequences), self._pool.runtime.options
        if self._batch is None or self._batch.slots != rows:
            if self._batch is not None:
                self._batch.close()
            self._batch = self._pool.runtime.batch(rows)
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
        """One new token a row: query [rows, q_heads, 1, d] as `scaled` gives it, its key and value
        -> [rows, 1, q_heads, d]; zeros for rows that have padding in the token's place."""
        assert self._batch is not None
        rows, q_heads, dim = query.shape[0], query.shape[1], value.shape[3]
        if len(self._absent) == rows:
            return query.new_zeros(rows, 1, q_heads, dim)
        if layer == self.order[0]:
            for row in self._absent:
                self._batch.clear(row)
            self._batch.begin_step()
        q, k, v = (_padded(x.transpose(1, 2)).contiguous() for x in (query, key, value))
        out = q.new_zeros(rows, 1, q_heads, v.shape[3]) if self._absent else None
        out = self._batch.attend(layer, q, k, v, out=out, report=self._reports[layer])
        if layer == self.order[-1]:
            self._count()
            for row in self._absent:
                self._batch.set(row, self._sequences[row])
        return out[..., :dim]

    def _count(self) -> None:
        """Adds the step's report to the counters, on the device and without waiting for it."""
        step, bins, ones = self._step, self._bins, self._ones
        if self._absent:
            there = [row for row in range(len(self._sequences)) if row not in self._absent]
            step = {name: array[:, there] for name, array in step.items()}
            bins = bins[:, there]
            ones = ones[: bins.numel()]
        for column, name in enumerate(("middle", "selected", "fetched", "looks")):
            self._counts[:, column] += step[name].sum((1, 2))
        bins = bins + step["verdict"]
        self._verdicts.scatter_add_(0, bins.flatten(), ones)
        self._steps += 1

    # ------------------------------------------------------------------ between steps

    def select(self, rows: list[int]) -> None:
        """The batch becomes `rows` of the present one; one that is named again is forked."""
        if self._pool is None:
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

    def truncate(self, lengths: list[int]) -> None:
        """Keeps the first tokens of every row."""
        for sequence, length in zip(self._sequences, lengths):
            sequence.truncate(length)

    def abandon(self, lengths: list[int]) -> None:
        """Gives up the step that is open, and keeps the first tokens of every row."""
        self.pending, self._absent = None, []
        if self._batch is not None:
            self._batch.close()  # a new one has no step open
            self._batch = None
        if self._pool is not None:
            self.truncate(lengths)
            self._fill_batch()

    def fork(self) -> "Store":
        """Another with the same rows, in the same pool, and counters of its own."""
        other = Store(self.layers, self._options, self._max_new_tokens)
        if self._pool is None:
            return other
        other._pool, other._device, other._scale = self._pool, self._device, self._scale
        other._sequences = [sequence.fork() for sequence in self._sequences]
        other._pool.stores.add(other)
        other._start_counting()
        other._fill_batch()
        return other

    def close(self) -> None:
        """Frees everything; the next prompt opens the store anew."""
        if self._batch is not None:
            self._batch.close()
        for sequence in self._sequences:
            sequence.close()
        if self._pool is not None:
            self._pool.stores.discard(self)
            if not self._pool.stores:
                self._pool.runtime.close()
        self._pool, self._batch, self._sequences, self._absent = None, None, [], []
        self.pending = None
        self._steps = 0

    # ------------------------------------------------------------------ counters

    def layer_stats(self) -> list[LayerStats]:
        """Counters by offloaded layer; waits for the device."""
        if self._pool is None:
            return []
        counts, verdicts = self._counts.tolist(), self._verdicts.view(-1, len(Verdict)).tolist()
        return [
            LayerStats(layer, self._steps, *counts[layer], *verdicts[layer]) for layer in self.order
        ]

    def runtime_stats(self) -> Stats | None:
        """Counters of the runtime; None before the first prompt."""
        return None if self._pool is None else self._pool.runtime.stats()


def _scale(query: torch.Tensor, scaling: float | None) -> float:
    """What logits are multiplied with; None: the default of attention."""
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _chosen(marks: torch.Tensor) -> slice | torch.Tensor:
    """Which tokens are marked [tokens]: a slice where these are the last ones."""
    tokens, count = marks.shape[0], int(marks.sum())
    if bool(marks[tokens - count :].all()):
        return slice(tokens - count, tokens)
    return marks.nonzero().flatten()


def _shape_options(
    layers: list[bool], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> dict[str, Any]:
    """Options of a runtime that follow from one layer's call; `layers` marks those with rows."""
    heads = key.shape[1]
    dims = [-(-x.shape[3] // _HEAD_DIM) * _HEAD_DIM for x in (key, value)]
    return {
        "num_layers": len(layers),
        "num_q_heads": query.shape[1],
        "num_kv_heads": heads,
        "layer_kv_heads": [heads * kept for kept in layers],
        "head_dim_k": dims[0],
        "head_dim_v": dims[1],
        "dtype": _DTYPES[key.dtype],
        "softmax_scale": scale,
    }


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Rows whose last dimension is a multiple of 16: zeros change neither logits nor outputs."""
    missing = -rows.shape[-1] % _HEAD_DIM
    return pad(rows, (0, missing)) if missing else rows
