"""What one attention call is given: arrays checked and put into vattn_attend_params."""

from dataclasses import dataclass

from . import _structs as c
from ._arguments import shown, whole
from ._arrays import Array, View, dense_view, empty_like, view
from ._enums import Partial
from ._errors import invalid
from ._library import struct
from ._runtime import DTYPE_NAMES, Runtime

TIMELINE_MARKS = 8  # VATTN_TIMELINE_MARKS


@dataclass
class Report:
    """What one `Batch.attend` tells beside its output; arrays that are None are not asked for.

    All are contiguous; `Batch.report` makes them. Rows of empty slots are not written.
    """

    # With several query tokens the next three are [slots, tokens, q_heads].
    lse: Array | None = None  # [slots, q_heads] float32: ln(sum exp(s))
    verdict: Array | None = None  # [slots, q_heads] int32: Verdict
    error: Array | None = (
        None  # [slots, q_heads] float32: bound on the relative error; 0 when exact
    )
    # And these are of all query tokens together.
    selected: Array | None = None  # [slots, kv_heads] int32: middle rows read
    fetched: Array | None = None  # [slots, kv_heads] int32: of them not in the hot set
    looks: Array | None = None  # [slots, kv_heads] int32: draws made
    middle: Array | None = None  # [slots, kv_heads] int64: tokens in the middle
    timeline: Array | None = None  # [TIMELINE_MARKS] uint64: ns; CUDA with policy verified only


@dataclass
class Selection:
    """Chosen tokens of one layer; `Batch.selection` makes the arrays."""

    tokens: Array  # [slots, kv_heads, capacity] int32: ascending token numbers
    counts: Array  # [slots, kv_heads] int32: entries in use
    log_weights: Array | None  # [slots, kv_heads, capacity] float32: -ln pi, added to the logits


# name -> (dtype, by query head or KV head)
REPORT = {
    "lse": ("f32", "q"),
    "verdict": ("i32", "q"),
    "error": ("f32", "q"),
    "selected": ("i32", "kv"),
    "fetched": ("i32", "kv"),
    "looks": ("i32", "kv"),
    "middle": ("i64", "kv"),
    "timeline": ("u64", ""),
}


class AttendCall:
    """The params of one call, and views of the arrays that they point into."""

    def __init__(
        self, runtime: Runtime, slots: int, layer: int, requests: int | None = None
    ) -> None:
        """slots: rows of the arrays by query head; requests: of those by KV head, if others."""
        options = runtime._options
        self.params = struct(c.AttendParams, "vattn_attend_params_init")
        self.params.layer = layer
        self.views: list[View] = []
        self._runtime = runtime
        self._slots = slots
        self._requests = slots if requests is None else requests
        self._tokens = 1
        self._dtype = DTYPE_NAMES[options["dtype"]]
        self._q_heads, self._kv_heads = options["num_q_heads"], runtime.kv_heads(layer)
        self._dims = options["head_dim_k"], options["head_dim_v"]

    def rows(self, q: Array, k_new: Array | None, v_new: Array | None) -> None:
        """q [slots, q_heads, head_dim_k], or [slots, tokens, ...], and the new tokens' rows."""
        dim_k, dim_v = self._dims
        extents = view(q, "q").shape
        if len(extents) == 4:
            self._tokens = self.params.num_tokens = whole(extents[1], "tokens of q", 1, 16)
        for name, array, heads, dim in (
            ("q", q, self._q_heads, dim_k),
            ("k_new", k_new, self._kv_heads, dim_k),
            ("v_new", v_new, self._kv_heads, dim_v),
        ):
            if array is not None or name == "q":
                taken = self._take(array, name, self._by_token(heads, dim), (self._dtype,))
                setattr(self.params, name, taken.pointer)

    def output(self, out: Array | None, like: Array) -> Array:
        """out [slots, q_heads, head_dim_v], or with tokens as q has it; made if None."""
        shape = self._by_token(self._q_heads, self._dims[1])
        if out is None:
            out = empty_like(like, (*self.views[0].shape[:-1], shape[-1]), self._dtype)
        taken = self._take(out, "out", shape, ("f32", "f16", "bf16"), written=True)
        self.params.out = taken.pointer
        self.params.out_dtype = dtype_number(taken)
        return out

    def report(self, report: Report | None) -> None:
        """The arrays of a report that are given."""
        if report is not None and not isinstance(report, Report):
            raise invalid(f"report is {shown(report)}, must be a Report")
        shapes = report_shapes(self._slots, self._q_heads, self._kv_heads, self._tokens)
        shapes["kv"] = (self._requests, self._kv_heads)
        for name, (kind, heads) in REPORT.items():
            array = getattr(report, name, None)
            if array is not None:
                taken = self._take(array, f"report.{name}", shapes[heads], (kind,), written=True)
                setattr(self.params, name, taken.pointer)

    def scores(self, scores: Array | None) -> None:
        """scores [slots, q_heads or kv_heads, stride] of floats, or [slots, tokens, ...]."""
        if scores is None:
            return
        extents = view(scores, "scores").shape
        heads = extents[-2] if len(extents) > 1 else 0
        if heads not in (self._q_heads, self._kv_heads):
            heads = self._kv_heads
        stride = extents[-1] if extents else 0
        shape = self._by_token(heads, stride)
        taken = self._take(scores, "scores", shape, ("f32", "f16", "bf16"))
        self.params.scores, self.params.scores_dtype = taken.pointer, dtype_number(taken)
        self.params.scores_stride, self.params.score_heads = stride, heads

    def slice(self, partial: Array, rank: int, ranks: int) -> None:
        """Records of a slice of a context, [slots, q_heads, floats], to be written."""
        taken = self._take(partial, "partial", self._records(), ("f32",), written=True)
        self.params.partial = taken.pointer
        self.params.rank, self.params.ranks = rank, ranks

    def gathered(self, gathered: Array, again: Array | None) -> None:
        """Records of all ranks, [ranks, slots, q_heads, floats], and again [1] int32."""
        ranks = view(gathered, "gathered").shape[:1]
        taken = self._take(gathered, "gathered", (*ranks, *self._records()), ("f32",))
        self.params.gathered = taken.pointer
        if again is not None:
            taken = self._take(again, "again", (1,), ("i32",), written=True)
            self.params.again = taken.pointer

    def answer(self, out: Array | None, like: Array) -> Array:
        """out [slots, q_heads, head_dim_v], for a call without q; made if None."""
        shape = (self._slots, self._q_heads, self._dims[1])
        if out is None:
            out = empty_like(like, shape, self._dtype)
        taken = self._take(out, "out", shape, ("f32", "f16", "bf16"), written=True)
        self.params.out = taken.pointer
        self.params.out_dtype = next(k for k, name in DTYPE_NAMES.items() if name == taken.dtype)
        return out

    def _records(self) -> tuple[int, ...]:
        return (self._slots, self._q_heads, record_floats(self._dims[1]))

    def selection(self, selection: Selection, written: bool) -> c.SelectionParams:
        """The lists, read or to be written."""
        if not isinstance(selection, Selection):
            raise invalid(f"selection is {shown(selection)}, must be a Selection")
        lists: c.SelectionParams = struct(c.SelectionParams, "vattn_selection_init")
        extents = view(selection.tokens, "selection.tokens").shape
        lists.capacity = extents[-1] if extents else 0
        shape = (self._slots, self._kv_heads, lists.capacity)
        for name, kind, extent in (
            ("tokens", "i32", shape),
            ("counts", "i32", shape[:2]),
            ("log_weights", "f32", shape),
        ):
            array = getattr(selection, name)
            if array is not None:
                taken = self._take(array, f"selection.{name}", extent, (kind,), written)
                setattr(lists, name, taken.pointer)
        return lists

    def _by_token(self, heads: int, extent: int) -> tuple[int, ...]:
        tokens = (self._tokens,) if self._tokens > 1 else ()
        return (self._slots, *tokens, heads, extent)

    def _take(
        self,
        array: Array,
        name: str,
        shape: tuple[int, ...],
        kinds: tuple[str, ...],
        written: bool = False,
    ) -> View:
        taken = dense_view(array, name, (shape, (shape[0], 1, *shape[1:])), kinds, written)
        self._runtime.check_place(taken, name)
        if self.views and (taken.device >= 0) != (self.views[0].device >= 0):
            place = "on a device" if taken.device >= 0 else "in host memory"
            raise invalid(f"{name} is {place}, must be where q is")
        self.views.append(taken)
        return taken


def dtype_number(array: View) -> int:
    """The vattn_dtype of an array of floats."""
    return next(number for number, name in DTYPE_NAMES.items() if name == array.dtype)


def record_floats(head_dim_v: int) -> int:
    """Floats of a record of one query head (vattn_partial of vattn.h)."""
    return int(Partial.SCALARS) + 2 * head_dim_v


def report_shapes(
    slots: int, q_heads: int, kv_heads: int, tokens: int = 1
) -> dict[str, tuple[int, ...]]:
    """Shapes of a report's arrays by the kind of head that they are about."""
    by_query = (slots, tokens, q_heads) if tokens > 1 else (slots, q_heads)
    return {"q": by_query, "kv": (slots, kv_heads), "": (TIMELINE_MARKS,)}
