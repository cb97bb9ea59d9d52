"""Runtimes and sequences."""
import ctypes
import enum
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from . import _structs as c
from ._arrays import Array, View, view
from ._library import LIBRARY, call, invalid, made, struct, text

if TYPE_CHECKING:
    from ._batch import Batch

LogFunction = Callable[[c.LogLevel, str], None]

_ENUMS: dict[str, type[enum.IntEnum]] = {
    "dtype": c.DType, "backend": c.Backend, "policy": c.Policy, "index": c.Index, "norm": c.Norm,
    "on_unverified": c.OnUnverified, "bound": c.Bound, "target": c.Target}
DTYPE_NAMES = {c.DType.F32: "f32", c.DType.F16: "f16", c.DType.BF16: "bf16"}


@dataclass(frozen=True)
class Stats:
    """Counters of a runtime since it was made; see vattn_stats in vattn.h."""
    host_bytes_limit: int
    host_bytes_used: int    # in blocks that a sequence holds or has reserved
    table_bytes: int        # block tables, index tables, controller state
    sequences: int          # alive
    tokens: int             # over sequences and layers
    steps: int              # attend calls x filled slots
    heads_exact: int        # query heads by verdict
    heads_verified: int
    heads_dense: int
    heads_best_effort: int
    rows_middle: int        # rows that dense attention would have read from the middle
    rows_selected: int      # rows read
    rows_fetched: int       # of them not in the hot set
    bytes_fetched: int
    looks: int              # draws, over KV heads
    full_refusals: int      # calls answered FULL
    blocks_copied: int      # shared blocks copied on write


class Handle:
    """A handle of the library: closed once, by `close`, by `with`, or when it is collected."""

    _destroy = ""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @property
    def handle(self) -> int:
        """The C pointer."""
        if self._handle is None:
            raise invalid(f"{type(self).__name__} is closed, must be open")
        return self._handle

    def close(self) -> None:
        """Frees it; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            getattr(LIBRARY, self._destroy)(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def check_options(**options: Any) -> c.Options:
    """The struct of `options`, with the names and types of vattn_options checked, ranges not yet."""
    value: c.Options = struct(c.Options, "vattn_options_init")
    call("vattn_options_from_json", json.dumps(options).encode(), ctypes.byref(value))
    return value


class Runtime(Handle):
    """One device or CPU: the pool for all rows, the options, the counters. Serves many threads.

    Options are the fields of vattn_options by name (vattn.h lists them with their limits), enums by
    lower-case name:

        Runtime(num_layers=28, num_q_heads=12, num_kv_heads=2, head_dim_k=128, head_dim_v=128,
                dtype="bf16", policy="verified", epsilon=.1, delta=.05, host_bytes=4 << 30)

    `log` is called as log(level, message) on the thread of the call that caused the line.
    Raises InvalidArgumentError, OutOfMemoryError, NotSupportedError or Error.
    """

    _destroy = "vattn_runtime_destroy"

    def __init__(self, *, log: LogFunction | None = None, **options: Any) -> None:
        chosen = check_options(**options)
        if log is not None:
            self._log = c.LOG_FUNCTION(lambda _, level, message: log(
                c.LogLevel(level), message.decode(errors="replace")))
            chosen.log = self._log
        super().__init__(made("vattn_runtime_create", ctypes.byref(chosen)))
        self._children: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._options = self._read_options()

    def _read_options(self) -> dict[str, Any]:
        chosen = struct(c.Options, "vattn_options_init")
        call("vattn_runtime_options", self.handle, ctypes.byref(chosen))
        options: dict[str, Any] = {}
        for name, kind in c.Options._fields_:
            value = getattr(chosen, name)
            if name in _ENUMS:
                options[name] = _ENUMS[name](value)
            elif name == "layer_kv_heads":
                heads = ctypes.cast(value, ctypes.POINTER(ctypes.c_int32)) if value else None
                options[name] = (heads[: chosen.num_layers] if heads
                                 else [chosen.num_kv_heads] * chosen.num_layers)
            elif name == "profile":
                options[name] = value.decode() if value else ""
            elif name not in ("struct_size", "reserved0", "log", "log_user"):
                options[name] = value
        return options

    @property
    def options(self) -> dict[str, Any]:
        """The options in force, every default resolved; layer_kv_heads has one number a layer."""
        return dict(self._options)

    def sequence(self, id: int = 0, reserve_tokens: int = 0) -> "Sequence":
        """An empty sequence.

        id keys its random numbers, 0: a number of the runtime's own. Blocks for reserve_tokens
        tokens in every layer are set aside now. FullError if they cannot be.
        """
        chosen = struct(c.SequenceOptions, "vattn_sequence_options_init")
        chosen.id, chosen.reserve_tokens = id, reserve_tokens
        return Sequence(self, made("vattn_sequence_create", self.handle, ctypes.byref(chosen)))

    def restore(self, path: str | os.PathLike[str]) -> "Sequence":
        """A saved sequence, read back: attention on it is bit-identical.

        Error with status NOT_FOUND: no such file; DATA_LOSS: cut short, changed or of another layout.
        """
        return Sequence(self, made("vattn_sequence_restore", self.handle, os.fsencode(path)))

    def batch(self, slots: int) -> "Batch":
        """A batch with room for `slots` sequences, 1 to 4096."""
        from ._batch import Batch
        return Batch(self, made("vattn_batch_create", self.handle, slots), slots)

    def stats(self) -> Stats:
        """The counters now."""
        counters = c.StatsStruct()
        call("vattn_runtime_stats", self.handle, ctypes.byref(counters), ctypes.sizeof(counters))
        return Stats(**{field.name: getattr(counters, field.name) for field in fields(Stats)})

    def prometheus(self) -> str:
        """The counters as Prometheus text."""
        return text("vattn_stats_prometheus", self.handle)

    def kv_heads(self, layer: int) -> int:
        """KV heads of a layer; 0 if it was left out."""
        heads: list[int] = self._options["layer_kv_heads"]
        if not 0 <= layer < len(heads):
            raise invalid(f"layer is {layer}, must be 0 to {len(heads) - 1}")
        return heads[layer]

    def check_place(self, array: View, name: str) -> None:
        """Refuses device memory that this runtime cannot reach."""
        options = self._options
        if array.device >= 0 and options["backend"] != c.Backend.CUDA:
            raise invalid(f"{name} is on cuda:{array.device}, must be in host memory: the runtime's backend is cpu")
        if array.device not in (-1, options["device"]):
            raise invalid(f"{name} is on cuda:{array.device}, must be on cuda:{options['device']} as the runtime is")

    def close(self) -> None:
        """Frees the runtime, after its sequences and batches."""
        for child in sorted(getattr(self, "_children", ()), key=lambda child: isinstance(child, Sequence)):
            child.close()
        super().close()


class Sequence(Handle):
    """One request: its rows of every layer. Used by one thread at a time."""

    _destroy = "vattn_sequence_destroy"

    def __init__(self, runtime: Runtime, handle: int) -> None:
        super().__init__(handle)
        self.runtime = runtime
        runtime._children.add(self)

    def append(self, layer: int, k: Array, v: Array | None = None, q: Array | None = None) -> None:
        """Adds prompt tokens to one layer, in chunks of any size; returns when they are copied.

        k [tokens, kv_heads, head_dim_k], post-RoPE, and v [tokens, kv_heads, head_dim_v] in the
        runtime's dtype; v is left out with shared_kv. q [queries, q_heads, head_dim_k], post-RoPE and
        unscaled, are the queries of the last tokens of k: they calibrate the index; the last 512 of
        the prompt will do. Any strides, as long as the last dimension is contiguous. On CUDA k and v,
        and q apart from them, may be in device memory; the stream that their owner works on is waited
        for. FullError: nothing was added and the sequence goes on as before.
        """
        options = self.runtime._options
        heads = self.runtime.kv_heads(layer)
        params = struct(c.AppendParams, "vattn_append_params_init")
        params.layer = layer
        keys = self._rows(k, "k", heads, options["head_dim_k"])
        given = {"k": keys}
        if v is not None:
            given["v"] = self._rows(v, "v", heads, options["head_dim_v"])
            if given["v"].shape[0] != keys.shape[0]:
                raise invalid(f"v has {given['v'].shape[0]} tokens, must have the {keys.shape[0]} of k")
        if q is not None:
            given["q"] = self._rows(q, "q", options["num_q_heads"], options["head_dim_k"])
            params.num_queries = given["q"].shape[0]
        params.num_tokens = keys.shape[0]
        for name, array in given.items():
            setattr(params, name, array.pointer)
            setattr(params, f"{name}_token_stride", array.strides[0])
            setattr(params, f"{name}_head_stride", array.strides[1])
            _wait(array)
        call("vattn_append", self.handle, ctypes.byref(params))

    def _rows(self, array: Array, name: str, heads: int, dim: int) -> View:
        rows = view(array, name)
        if len(rows.shape) != 3 or rows.shape[1:] != (heads, dim):
            raise invalid(f"{name} has shape {list(rows.shape)}, must be [tokens, {heads}, {dim}]")
        if rows.strides[2] != 1 and dim > 1:
            raise invalid(f"{name} has strides {list(rows.strides)}, must have 1 for the last dimension")
        if rows.dtype != DTYPE_NAMES[self.runtime._options["dtype"]]:
            raise invalid(f"{name} has elements of {rows.dtype}, must be "
                          f"{DTYPE_NAMES[self.runtime._options['dtype']]} as the runtime's are")
        self.runtime.check_place(rows, name)
        return rows

    def fork(self, id: int = 0) -> "Sequence":
        """A second sequence with the same tokens. Blocks are shared until one of the two writes."""
        return Sequence(self.runtime, made("vattn_sequence_fork", self.handle, id))

    def truncate(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens of every layer; layers that have fewer are left alone."""
        call("vattn_sequence_truncate", self.handle, tokens)

    def length(self, layer: int = 0) -> int:
        """Tokens that one layer holds."""
        tokens = ctypes.c_int64()
        call("vattn_sequence_length", self.handle, layer, ctypes.byref(tokens))
        return tokens.value

    def build_index(self) -> None:
        """Codes every token that has left the window; the first step after an append does it else."""
        call("vattn_sequence_build_index", self.handle)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes rows, codes and tables to a file that appears whole or not at all."""
        call("vattn_sequence_save", self.handle, os.fsencode(path))

    def hibernate(self, path: str | os.PathLike[str]) -> None:
        """Saves, then frees the host blocks; the sequence refuses use until `wake`."""
        call("vattn_sequence_hibernate", self.handle, os.fsencode(path))

    def wake(self) -> None:
        """Brings a hibernated sequence back from its file, which is left in place."""
        call("vattn_sequence_wake", self.handle)


def _wait(array: View) -> None:
    """Waits for what writes an array of torch on a CUDA device."""
    if array.device >= 0 and hasattr(array.owner, "data_ptr"):
        import torch
        torch.cuda.current_stream(array.device).synchronize()
