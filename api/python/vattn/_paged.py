"""Pools of KV blocks that the caller owns, and attention over them."""

import ctypes
import sys
from collections.abc import Sequence as Listed
from typing import Any

from . import _structs as c
from ._arguments import shown, whole
from ._arrays import Array, View, dense_view, empty_like, stream_handle, view
from ._attend import REPORT, AttendCall, Report, dtype_number, report_shapes
from ._enums import Backend, Policy
from ._errors import invalid
from ._handle import Child
from ._library import call, made, struct
from ._options import Path
from ._runtime import DTYPE_NAMES, Runtime

# An array of each layer, or one array with the layers in front.
Layers = Listed[Array | None] | Array


class Paged(Child):
    """A pool of KV blocks of the caller's, and decode steps over it. Used by one thread at a time.

    `Runtime.paged` makes it. A slot is a token's place in the pool: block id * block_tokens + place
    in the block. A step is `begin_step`, then for each layer `write` of the new rows and `attend`.
    On CUDA arrays but those of `prefill` are read on the device when its turn comes: device or pinned
    host memory, which must live until the stream has passed the call.
    """

    _destroy = "vattn_paged_destroy"
    _instead = {
        "copied": "Runtime.paged makes another one over the same pool",
        "pickled": "Runtime.paged makes another one",
    }

    def __init__(
        self,
        runtime: Runtime,
        k: Layers,
        v: Layers | None,
        *,
        max_tokens: int,
        max_requests: int,
        max_query_tokens: int,
        max_step_tokens: int,
        tables: Path | None,
        model: str | None,
        codes: Layers | None,
        hot_bytes: int,
        pinned: bool | None,
    ) -> None:
        options: c.PagedOptions = struct(c.PagedOptions, "vattn_paged_options_init")
        options.tables, options.model = tables, model
        pool = _Pool(runtime, k, v)
        pool.fill(options)
        if codes is not None:
            pool.fill_codes(options, codes)
        options.max_tokens, options.max_step_tokens = max_tokens, max_step_tokens
        options.max_requests, options.max_query_tokens = max_requests, max_query_tokens
        options.hot_bytes = hot_bytes
        options.pinned = pool.pinned() if pinned is None else bool(pinned)
        super().__init__(
            runtime, made("vattn_paged_create", runtime.handle, ctypes.byref(options))
        )
        self.num_blocks, self.block_tokens = options.num_blocks, options.block_tokens
        self.max_query_tokens = options.max_query_tokens
        self._pool: _Pool | None = pool
        self._step: tuple[Any, ...] = ()  # what the open step reads
        self._requests = 0  # of the open step

    def __repr__(self) -> str:
        if self.closed:
            return "<vattn.Paged, closed>"
        return f"<vattn.Paged of {self.num_blocks} blocks of {self.block_tokens} tokens>"

    def close(self) -> None:
        """Frees it, not the pool; a second call does nothing. On CUDA it waits for the device."""
        super().close()
        self._pool, self._step = None, ()

    def write(
        self,
        layer: int,
        slots: Array,
        k: Array | None = None,
        v: Array | None = None,
        *,
        stream: Any = None,
    ) -> None:
        """Writes rows of one layer to their slots and codes them; before what is to see them.

        slots [tokens] int64, each once; those outside of the pool, as -1 for padding, are left out.
        k [tokens, kv_heads, head_dim_k], post-RoPE, and v [tokens, kv_heads, head_dim_v]; v is left
        out with shared_kv, both if the caller has written the rows to the pool. The last dimension
        is contiguous, the others have positive strides.
        """
        runtime = self.runtime
        rows: c.PagedRows = struct(c.PagedRows, "vattn_paged_rows_init")
        rows.layer = layer
        heads = runtime.kv_heads(layer)
        places = view(slots, "slots")
        if len(places.shape) != 1:
            raise invalid(f"slots has shape {list(places.shape)}, must be [tokens]")
        places = self._dense(slots, "slots", places.shape, ("i64",))
        rows.slots, rows.num_tokens = places.pointer, places.shape[0]
        views = [places]
        for name, array, dim in (
            ("k", k, runtime._options["head_dim_k"]),
            ("v", v, runtime._options["head_dim_v"]),
        ):
            if array is not None:
                taken = _strided(runtime, array, name, (places.shape[0], heads, dim))
                _put(rows, name, taken)
                views.append(taken)
        call("vattn_paged_write", self.handle, ctypes.byref(rows), self._stream(stream, views))

    def begin_step(
        self,
        block_table: Array,
        lengths: Array,
        query_starts: Array,
        request_rows: Array,
        resets: Array | None = None,
        *,
        max_query_tokens: int | None = None,
        num_query_tokens: int | None = None,
        stream: Any = None,
    ) -> None:
        """Opens a step, whose layers `attend` then answers. All arrays are of int32.

        block_table [requests, entries]: the block ids of each request, entries at least
        ceil(max_tokens / block_tokens); rows may be apart. lengths [requests]: tokens, the new ones
        included; 0: no request here. query_starts [requests + 1], ascending from 0: where each one's
        query tokens, its last tokens, begin among those of the step. request_rows [requests]: a
        number of 0 to max_requests - 1 that a request has in all its steps. resets [requests]: 1 in
        the first step of a request. max_query_tokens: most query tokens of a request in this step,
        by default those that the pool was made for. num_query_tokens: those that q of `attend` has; by
        default the last of query_starts on the CPU, and on CUDA, where that is not read here,
        requests times max_query_tokens. The arrays keep their contents until the step's
        last layer is answered.
        """
        step: c.PagedStep = struct(c.PagedStep, "vattn_paged_step_init")
        table = view(block_table, "block_table")
        if len(table.shape) != 2:
            raise invalid(
                f"block_table has shape {list(table.shape)}, must be [requests, entries]"
            )
        count, entries = table.shape
        if entries > 1 and table.strides[1] != 1 or count > 1 and table.strides[0] < entries:
            raise invalid(
                f"block_table has strides {list(table.strides)}, must have contiguous rows"
            )
        if table.dtype != "i32":
            raise invalid(f"block_table has elements of {table.dtype}, must be i32")
        self.runtime.check_place(table, "block_table")
        step.num_requests = count
        step.max_query_tokens = (
            self.max_query_tokens if max_query_tokens is None else max_query_tokens
        )
        step.block_table = table.pointer
        step.block_table_stride = table.strides[0] if count > 1 else entries
        views = [table]
        for name, array, extent in (
            ("lengths", lengths, count),
            ("query_starts", query_starts, count + 1),
            ("request_rows", request_rows, count),
            ("resets", resets, count),
        ):
            if array is not None:
                taken = self._dense(array, name, (extent,), ("i32",))
                setattr(step, name, taken.pointer)
                views.append(taken)
        if num_query_tokens is None:
            num_query_tokens = count * step.max_query_tokens
            if self.runtime._options["backend"] == Backend.CPU:
                starts = views[2].pointer + 4 * count
                num_query_tokens = max(ctypes.c_int32.from_address(starts).value, 0)
        step.num_query_tokens = num_query_tokens
        handle = self._stream(stream, views)
        call("vattn_paged_begin_step", self.handle, ctypes.byref(step), handle)
        self._step = (views, step.max_query_tokens, step.num_query_tokens)
        self._requests = count

    def report(self, layer: int, q: Array, *names: str) -> Report:
        """A Report for `attend` with q in the open step: arrays for `names`, all if none are given."""
        for name in names:
            if name not in REPORT:
                raise invalid(f"report has no {shown(name)}, must be one of {', '.join(REPORT)}")
        chosen = names or [name for name in REPORT if name != "timeline"]
        tokens = view(q, "q").shape[0]
        heads = self.runtime.kv_heads(layer)
        shapes = report_shapes(tokens, self.runtime._options["num_q_heads"], heads)
        shapes["kv"] = (self._requests, heads)
        return Report(
            **{name: empty_like(q, shapes[REPORT[name][1]], REPORT[name][0]) for name in chosen}
        )

    def attend(
        self,
        layer: int,
        q: Array,
        *,
        out: Array | None = None,
        report: Report | None = None,
        scores: Array | None = None,
        dense: bool = False,
        stream: Any = None,
    ) -> Array:
        """Attends in a layer for all requests of the open step, whose rows have been written.

        q [query tokens, q_heads, head_dim_k], unscaled and contiguous, in the runtime's dtype: the
        query tokens of all requests one after the other. Returns `out` [query tokens, q_heads,
        head_dim_v] of float32, float16 or bfloat16 (by default a new array of the runtime's dtype).
        In the report lse, verdict and error are [query tokens, q_heads], selected, fetched, looks
        and middle [requests, kv_heads]. scores and dense as in `Batch.attend`, scores [query tokens,
        q_heads or kv_heads, stride].
        """
        extents = view(q, "q").shape
        if len(extents) != 3:
            raise invalid(
                f"q has shape {list(extents)}, must be [query tokens, "
                f"{self.runtime._options['num_q_heads']}, {self.runtime._options['head_dim_k']}]"
            )
        if not self._step:
            raise invalid("no step is open, begin_step must come first")
        if extents[0] != self._step[2]:
            raise invalid(f"q has {extents[0]} tokens, must have the {self._step[2]} of the step")
        given = AttendCall(self.runtime, extents[0], layer, self._requests)
        given.params.num_tokens = self._step[1]
        given.rows(q, None, None)
        out = given.output(out, q)
        given.report(report)
        given.scores(scores)
        if dense:
            given.params.policy = Policy.DENSE
        handle = self._stream(stream, given.views)
        call("vattn_paged_attend", self.handle, ctypes.byref(given.params), handle)
        return out

    def prefill(
        self,
        layer: int,
        q: Array,
        blocks: Array,
        length: int,
        *,
        out: Array | None = None,
        lse: Array | None = None,
    ) -> Array:
        """Exact attention of a request's last tokens, each to those up to its own; blocks.

        Their rows have been written. q [tokens, q_heads, head_dim_k] are 1 to 65536 queries, unscaled;
        blocks [ceil(length / block_tokens)] int32 the request's block ids, length its tokens with
        these. Returns `out` [tokens, q_heads, head_dim_v] of float32, float16 or bfloat16 (by default
        a new array of the runtime's dtype); lse [tokens, q_heads] float32 becomes ln(sum exp(s)). On
        CUDA torch's current stream is waited for. NotSupportedError as `Sequence.prefill`.
        """
        options = self.runtime._options
        params: c.PagedPrefillParams = struct(
            c.PagedPrefillParams, "vattn_paged_prefill_params_init"
        )
        params.layer, params.length = layer, length
        extents = view(q, "q").shape
        tokens = extents[0] if extents else 0
        queries = _strided(
            self.runtime, q, "q", (tokens, options["num_q_heads"], options["head_dim_k"])
        )
        _put(params, "q", queries)
        params.num_tokens = tokens
        entries = view(blocks, "blocks").shape
        needed = -(-params.length // self.block_tokens)
        if len(entries) != 1 or entries[0] < needed:
            raise invalid(f"blocks has shape {list(entries)}, must be [{needed}]")
        params.blocks = self._dense(blocks, "blocks", entries, ("i32",)).pointer
        shape = tokens, options["num_q_heads"], options["head_dim_v"]
        if out is None:
            out = empty_like(q, shape, DTYPE_NAMES[options["dtype"]])
        answers = self._dense(out, "out", shape, ("f32", "f16", "bf16"), written=True)
        params.out = answers.pointer
        params.out_dtype = dtype_number(answers)
        if lse is not None:
            params.lse = self._dense(lse, "lse", shape[:2], ("f32",), written=True).pointer
        torch = sys.modules.get("torch")
        if options["backend"] == Backend.CUDA and torch is not None:
            torch.cuda.current_stream(options["device"]).synchronize()
        call("vattn_paged_prefill", self.handle, ctypes.byref(params))
        return out

    def _dense(
        self,
        array: Array,
        name: str,
        shape: tuple[int, ...],
        kinds: tuple[str, ...],
        written: bool = False,
    ) -> View:
        taken = dense_view(array, name, (shape,), kinds, written)
        self.runtime.check_place(taken, name)
        return taken

    def _stream(self, stream: Any, views: list[View]) -> int | None:
        """The stream of a call: on CUDA torch's current one unless the caller or an array has one."""
        options = self.runtime._options
        if options["backend"] != Backend.CUDA:
            return None
        torch = sys.modules.get("torch")
        if stream is None and torch is not None and all(one.stream is None for one in views):
            stream = torch.cuda.current_stream(options["device"])
        return stream_handle(0 if stream is None and torch is None else stream, views)


class _Pool:
    """Views of the caller's arrays, by layer, and what they have in common."""

    def __init__(self, runtime: Runtime, k: Layers, v: Layers | None) -> None:
        options = runtime._options
        self._runtime = runtime
        self._extents: tuple[int, ...] | None = None  # blocks, tokens of one
        self._strides: tuple[int, ...] | None = None
        self._codes: list[View | None] = []
        self.keys = self._layers(k, "k", options["head_dim_k"])
        self.values = None if v is None else self._layers(v, "v", options["head_dim_v"])
        if self._extents is None:
            raise invalid("k is None in every layer, must be an array in those with KV heads")

    def _layers(self, arrays: Layers, name: str, dim: int) -> list[View | None]:
        heads = self._runtime._options["layer_kv_heads"]
        if not hasattr(arrays, "__len__") or len(arrays) != len(heads):
            number = len(arrays) if hasattr(arrays, "__len__") else shown(arrays)
            raise invalid(f"{name} has {number} layers, must have the {len(heads)} of the runtime")
        taken: list[View | None] = []
        for layer, count in enumerate(heads):
            array, what = arrays[layer], f"{name}[{layer}]"
            if (array is None) != (count == 0):
                wanted = "None: the layer has no KV heads" if count == 0 else "an array"
                raise invalid(f"{what} is {type(array).__name__}, must be {wanted}")
            taken.append(None if array is None else self._layer(array, what, count, dim))
        return taken

    def _layer(self, array: Array, what: str, heads: int, dim: int) -> View:
        taken = view(array, what)
        expected = (*(self._extents or taken.shape[:2]), heads, dim)
        if len(taken.shape) != 4 or taken.shape != expected:
            wanted = self._extents or ("blocks", "block_tokens")
            raise invalid(
                f"{what} has shape {list(taken.shape)}, must be "
                f"[{', '.join(map(str, (*wanted, heads, dim)))}]"
            )
        if dim > 1 and taken.strides[3] != 1:
            raise invalid(
                f"{what} has strides {list(taken.strides)}, must have 1 for the last dimension"
            )
        strides = self._strides or taken.strides[:3]
        if any(
            extent > 1 and mine != stride
            for extent, mine, stride in zip(expected, taken.strides, strides)
        ):
            raise invalid(
                f"{what} has strides {list(taken.strides[:3])}, must have {list(strides)} as the "
                "other arrays have"
            )
        dtype = DTYPE_NAMES[self._runtime._options["dtype"]]
        if taken.dtype != dtype:
            raise invalid(
                f"{what} has elements of {taken.dtype}, must be {dtype} as the runtime's are"
            )
        if taken.device >= 0:
            raise invalid(f"{what} is on cuda:{taken.device}, must be in host memory")
        if not taken.writable:
            raise invalid(f"{what} is read-only, must be writable")
        self._extents, self._strides = expected[:2], strides
        return taken

    def fill(self, options: c.PagedOptions) -> None:
        """Puts the pool's addresses and strides into the options."""
        assert self._extents is not None and self._strides is not None
        options.num_blocks, options.block_tokens = self._extents
        options.block_stride, options.token_stride, options.head_stride = self._strides
        for name, layers in (("k", self.keys), ("v", self.values)):
            if layers is not None:
                _point(options, name, layers)

    def fill_codes(self, options: c.PagedOptions, codes: Layers) -> None:
        """Puts the memory for codes into the options."""
        heads = self._runtime._options["layer_kv_heads"]
        if not hasattr(codes, "__len__") or len(codes) != len(heads):
            raise invalid(f"codes has another length than the {len(heads)} layers of the runtime")
        stride = None
        for layer, count in enumerate(heads):
            array, what = codes[layer], f"codes[{layer}]"
            if (array is None) != (count == 0):
                wanted = "None: the layer has no KV heads" if count == 0 else "an array"
                raise invalid(f"{what} is {type(array).__name__}, must be {wanted}")
            if array is None:
                self._codes.append(None)
                continue
            taken = view(array, what)
            used = (
                count * options.block_tokens * self._runtime._options["index_bytes"]
            )
            if (
                len(taken.shape) != 2
                or taken.shape[0] != options.num_blocks
                or taken.shape[1] < used
            ):
                raise invalid(
                    f"{what} has shape {list(taken.shape)}, must be [{options.num_blocks}, {used}] "
                    "or have more bytes a block"
                )
            if taken.dtype != "byte" or taken.strides[1] != 1:
                raise invalid(
                    f"{what} has elements of {taken.dtype} and strides {list(taken.strides)}, "
                    "must be of uint8 and contiguous within a block"
                )
            step = taken.strides[0] if taken.shape[0] > 1 else taken.shape[1]
            if stride is not None and step != stride:
                raise invalid(f"{what} has {step} bytes a block, must have {stride} as the others")
            stride = step
            self._runtime.check_place(taken, what)
            self._codes.append(taken)
        _point(options, "codes", self._codes)
        options.code_block_stride = stride or 0

    def pinned(self) -> bool:
        """Whether all of it is known to be page-locked."""
        on_cuda = self._runtime._options["backend"] == Backend.CUDA
        taken = [one for one in (*self.keys, *(self.values or [])) if one is not None]
        return on_cuda and all(
            hasattr(one.owner, "is_pinned") and one.owner.is_pinned() for one in taken
        )


def _point(options: c.PagedOptions, name: str, layers: list[View | None]) -> None:
    pointers = (ctypes.c_void_p * len(layers))(
        *(None if one is None else one.pointer for one in layers)
    )
    options.point(name, ctypes.addressof(pointers), pointers)


def _strided(runtime: Runtime, array: Array, name: str, shape: tuple[int, int, int]) -> View:
    """Rows or queries of a call: tokens and heads apart by any positive strides."""
    taken = view(array, name)
    if taken.shape != shape:
        raise invalid(f"{name} has shape {list(taken.shape)}, must be {list(shape)}")
    if any(
        stride <= 0 and extent > 1 for stride, extent in zip(taken.strides[:2], taken.shape[:2])
    ) or (shape[2] > 1 and taken.strides[2] != 1):
        raise invalid(
            f"{name} has strides {list(taken.strides)}, must have positive ones, and 1 for the last "
            "dimension"
        )
    dtype = DTYPE_NAMES[runtime._options["dtype"]]
    if taken.dtype != dtype:
        raise invalid(f"{name} has elements of {taken.dtype}, must be {dtype} as the runtime's are")
    runtime.check_place(taken, name)
    return taken


def _put(params: Any, name: str, array: View) -> None:
    """Address and strides of rows; 0, contiguous, for dimensions of one."""
    setattr(params, name, array.pointer)
    for stride, extent, kind in zip(array.strides, array.shape, ("token", "head")):
        setattr(params, f"{name}_{kind}_stride", stride if extent > 1 else 0)
