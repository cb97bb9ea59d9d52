"""Batches: decode steps."""

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from . import _structs as c
from ._arrays import Array, View, empty_like, stream_handle, view
from ._library import call, invalid, struct
from ._runtime import DTYPE_NAMES, Handle, Runtime
from ._sequence import Sequence

TIMELINE_MARKS = 8  # VATTN_TIMELINE_MARKS


@dataclass
class Report:
    """What one `Batch.attend` tells beside its output; arrays that are None are not asked for.

    All are contiguous; `Batch.report` makes them. Rows of empty slots are not written.
    """

    lse: Array | None = None  # [slots, q_heads] float32: ln(sum exp(s))
    verdict: Array | None = None  # [slots, q_heads] int32: Verdict
    error: Array | None = (
        None  # [slots, q_heads] float32: bound on the relative error; 0 when exact
    )
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
_REPORT = {
    "lse": ("f32", "q"),
    "verdict": ("i32", "q"),
    "error": ("f32", "q"),
    "selected": ("i32", "kv"),
    "fetched": ("i32", "kv"),
    "looks": ("i32", "kv"),
    "middle": ("i64", "kv"),
    "timeline": ("u64", ""),
}


class Batch(Handle):
    """A fixed number of slots for sequences, and their decode steps. Used by one thread at a time.

    A step is `begin_step`, then `attend` (or one of its relatives) once for every layer.
    """

    _destroy = "vattn_batch_destroy"

    def __init__(self, runtime: Runtime, handle: int, slots: int) -> None:
        super().__init__(handle)
        self.runtime = runtime
        self.slots = slots
        self._sequences: list[Sequence | None] = [None] * slots
        runtime._children.add(self)

    def set(self, slot: int, sequence: Sequence) -> None:
        """Puts a sequence into a slot; the slot's former one is taken out."""
        call("vattn_batch_set", self.handle, slot, sequence.handle)
        self._sequences[slot] = sequence

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        call("vattn_batch_clear", self.handle, slot)
        self._sequences[slot] = None

    def begin_step(self, new_tokens: int = 1, stream: Any = None) -> None:
        """Opens a step: makes room for new_tokens (0 or 1) tokens in every layer of every sequence.

        On CUDA the step's tables are enqueued on `stream`, by default torch's current one, else the
        legacy default stream; the calls of the step must follow in its order. FullError: nothing
        changed, no step is open, the sequences stay usable.
        """
        handle = None
        if self.runtime._options["backend"] == c.Backend.CUDA:
            torch = sys.modules.get("torch")
            if stream is None:
                stream = torch.cuda.current_stream(self.runtime._options["device"]) if torch else 0
            handle = stream_handle(stream, [])
        call("vattn_batch_begin_step", self.handle, new_tokens, handle)

    def report(self, layer: int, like: Array, *names: str) -> Report:
        """A Report with arrays for `names` (if none, all but timeline) where `like` lies."""
        shapes = {
            "q": (self.slots, self.runtime._options["num_q_heads"]),
            "kv": (self.slots, self.runtime.kv_heads(layer)),
            "": (TIMELINE_MARKS,),
        }
        chosen = names or [name for name in _REPORT if name != "timeline"]
        return Report(
            **{
                name: empty_like(like, shapes[_REPORT[name][1]], _REPORT[name][0])
                for name in chosen
            }
        )

    def selection(self, layer: int, like: Array, capacity: int) -> Selection:
        """A Selection with room for `capacity` tokens per slot and KV head, where `like` lies."""
        heads = self.runtime.kv_heads(layer)
        shape = (self.slots, heads, capacity)
        return Selection(
            empty_like(like, shape, "i32"),
            empty_like(like, shape[:2], "i32"),
            empty_like(like, shape, "f32"),
        )

    def attend(
        self,
        layer: int,
        q: Array,
        k_new: Array | None = None,
        v_new: Array | None = None,
        *,
        out: Array | None = None,
        report: Report | None = None,
        stream: Any = None,
    ) -> Array:
        """Writes the new token's row and attends, for every filled slot. Each layer once per step.

        q [slots, q_heads, head_dim_k], unscaled, k_new [slots, kv_heads, head_dim_k] and v_new
        [slots, kv_heads, head_dim_v] in the runtime's dtype, contiguous; k_new is left out iff
        new_tokens was 0, v_new also with shared_kv. Returns `out` [slots, q_heads, head_dim_v] of
        float32, float16 or bfloat16 (by default a new array of the runtime's dtype). Each may
        have a dimension of 1 after the slots.

        On CUDA with arrays in device memory the call enqueues on `stream`, by default the one that
        the owner of q works on; the arrays must live until the stream has passed the call. With
        arrays in host memory it blocks.
        """
        return self._call("vattn_attend", layer, (q, k_new, v_new), out, report, None, stream)

    def attend_selected(
        self,
        layer: int,
        q: Array,
        k_new: Array | None,
        v_new: Array | None,
        selection: Selection,
        *,
        out: Array | None = None,
        report: Report | None = None,
        stream: Any = None,
    ) -> Array:
        """As `attend`, over the tokens of `selection` in place of the library's choice.

        Sinks and window count only if listed. InvalidArgumentError for tokens that are out of range
        or do not ascend. Every verdict is BEST_EFFORT.
        """
        return self._call(
            "vattn_attend_selected", layer, (q, k_new, v_new), out, report, selection, stream
        )

    def select(
        self,
        layer: int,
        q: Array,
        k_new: Array | None,
        v_new: Array | None,
        selection: Selection,
        *,
        report: Report | None = None,
        stream: Any = None,
    ) -> None:
        """Fills `selection` with sinks, window and first draw, for engines with their own kernel.

        Of the report `selected` and `middle` are written. FullError if the capacity is too small:
        `counts` then hold the need, and the call may be made again. Needs policy verified.
        """
        self._call("vattn_select", layer, (q, k_new, v_new), None, report, selection, stream)

    def _call(
        self,
        function: str,
        layer: int,
        given: tuple[Array | None, ...],
        out: Array | None,
        report: Report | None,
        selection: Selection | None,
        stream: Any,
    ) -> Array:
        options, kv_heads = self.runtime._options, self.runtime.kv_heads(layer)
        dtype, q_heads = DTYPE_NAMES[options["dtype"]], options["num_q_heads"]
        params = struct(c.AttendParams, "vattn_attend_params_init")
        params.layer = layer
        views: list[View] = []

        def take(
            array: Array, name: str, shape: tuple[int, ...], kinds: tuple[str, ...], written: bool
        ) -> View:
            taken = view(array, name)
            if taken.shape != shape and taken.shape != (shape[0], 1, *shape[1:]):
                raise invalid(f"{name} has shape {list(taken.shape)}, must be {list(shape)}")
            if not taken.contiguous():
                raise invalid(f"{name} has strides {list(taken.strides)}, must be contiguous")
            if taken.dtype not in kinds:
                raise invalid(f"{name} has elements of {taken.dtype}, must be {' or '.join(kinds)}")
            if written and not taken.writable:
                raise invalid(f"{name} is read-only, must be writable")
            self.runtime.check_place(taken, name)
            if views and (taken.device >= 0) != (views[0].device >= 0):
                raise invalid(
                    f"{name} is {'on a device' if taken.device >= 0 else 'in host memory'}, must "
                    "be where q is"
                )
            views.append(taken)
            return taken

        dims = {
            "q": (q_heads, options["head_dim_k"]),
            "k_new": (kv_heads, options["head_dim_k"]),
            "v_new": (kv_heads, options["head_dim_v"]),
        }
        for (name, extents), array in zip(dims.items(), given):
            if array is not None:
                setattr(
                    params, name, take(array, name, (self.slots, *extents), (dtype,), False).pointer
                )
        if function != "vattn_select":
            if out is None:
                middle = (1,) * (len(views[0].shape) - 3)
                out = empty_like(
                    given[0], (self.slots, *middle, q_heads, options["head_dim_v"]), dtype
                )
            taken = take(
                out,
                "out",
                (self.slots, q_heads, options["head_dim_v"]),
                ("f32", "f16", "bf16"),
                True,
            )
            params.out = taken.pointer
            params.out_dtype = next(key for key, name in DTYPE_NAMES.items() if name == taken.dtype)
        shapes = {"q": (self.slots, q_heads), "kv": (self.slots, kv_heads), "": (TIMELINE_MARKS,)}
        for name, (kind, heads) in _REPORT.items():
            array = getattr(report, name, None)
            if array is not None:
                setattr(
                    params,
                    name,
                    take(array, f"report.{name}", shapes[heads], (kind,), True).pointer,
                )
        arguments = [self.handle, ctypes.byref(params)]
        if selection is not None:
            written = function == "vattn_select"
            lists = struct(c.SelectionParams, "vattn_selection_init")
            tokens = view(selection.tokens, "selection.tokens")
            lists.capacity = tokens.shape[-1] if tokens.shape else 0
            shape = (self.slots, kv_heads, lists.capacity)
            lists.tokens = take(
                selection.tokens, "selection.tokens", shape, ("i32",), written
            ).pointer
            lists.counts = take(
                selection.counts, "selection.counts", shape[:2], ("i32",), written
            ).pointer
            if selection.log_weights is not None:
                lists.log_weights = take(
                    selection.log_weights, "selection.log_weights", shape, ("f32",), written
                ).pointer
            arguments.append(ctypes.byref(lists))
        call(function, *arguments, stream_handle(stream, views))
        return out
