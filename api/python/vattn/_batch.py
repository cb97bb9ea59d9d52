"""Batches: decode steps."""

import ctypes
import sys
from typing import Any

from . import _structs as c
from ._arguments import shown, whole
from ._arrays import Array, empty_like, stream_handle, view
from ._attend import REPORT, AttendCall, Report, Selection, record_floats, report_shapes
from ._enums import Backend, Policy
from ._errors import invalid
from ._handle import Child
from ._library import call
from ._runtime import Runtime
from ._sequence import Sequence


class Batch(Child):
    """A fixed number of slots for sequences, and their decode steps. Used by one thread at a time.

    A step is `begin_step`, then `attend` (or one of its relatives) once for every layer. A step that
    an error or KeyboardInterrupt ended half way is given up by `abandon`.
    """

    _destroy = "vattn_batch_destroy"
    _instead = {
        "copied": "Runtime.batch makes another one, for forks of the sequences",
        "pickled": "Runtime.batch makes another one",
    }

    def __init__(self, runtime: Runtime, handle: int, slots: int) -> None:
        super().__init__(runtime, handle)
        self.slots = slots
        self._sequences: list[Sequence | None] = [None] * slots

    def __repr__(self) -> str:
        if self.closed:
            return "<vattn.Batch, closed>"
        filled = sum(sequence is not None for sequence in self._sequences)
        return f"<vattn.Batch of {self.slots} slots, {filled} filled>"

    def close(self) -> None:
        """Frees it, not its sequences; a second call does nothing."""
        super().close()
        self._sequences = []

    def set(self, slot: int, sequence: Sequence) -> None:
        """Puts a sequence into a slot; the slot's former one is taken out."""
        if not isinstance(sequence, Sequence):
            raise invalid(f"sequence is {shown(sequence)}, must be a Sequence")
        call("vattn_batch_set", self.handle, slot, sequence.handle)
        self._sequences[slot] = sequence

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        call("vattn_batch_clear", self.handle, slot)
        self._sequences[slot] = None

    def begin_step(self, new_tokens: int = 1, stream: Any = None) -> None:
        """Opens a step: makes room for new_tokens (0 to 16) tokens in every layer of every sequence.

        They are the step's query tokens; with 0 it has one, the last token that is there. With
        several, each sees the tokens up to its own; `Sequence.truncate` takes those back that are
        rejected.
        On CUDA the step's tables are enqueued on `stream`, by default torch's current one, else the
        legacy default stream; the calls of the step must follow in its order. FullError: nothing
        changed, no step is open, the sequences stay usable.
        """
        handle = None
        if self.runtime._options["backend"] == Backend.CUDA:
            torch = sys.modules.get("torch")
            if stream is None:
                stream = torch.cuda.current_stream(self.runtime._options["device"]) if torch else 0
            handle = stream_handle(stream, [])
        call("vattn_batch_begin_step", self.handle, new_tokens, handle)

    def abandon(self) -> None:
        """Gives the open step up, as after an error or KeyboardInterrupt between two layers.

        Whatever its layers did, each sequence has the tokens and random numbers again that it had
        before `begin_step`: the same step, begun anew, answers the same. Nothing is done without an
        open step. On CUDA it waits for the device. See vattn_batch_abandon in vattn.h.
        """
        call("vattn_batch_abandon", self.handle)

    def report(self, layer: int, like: Array, *names: str, tokens: int = 1) -> Report:
        """A Report with arrays for `names` (if none, all but timeline) where `like` lies.

        tokens: query tokens of the calls that it is for, 1 to 16.
        """
        shapes = report_shapes(
            self.slots,
            self.runtime._options["num_q_heads"],
            self.runtime.kv_heads(layer),
            whole(tokens, "tokens", 1, 16),
        )
        for name in names:
            if name not in REPORT:
                raise invalid(f"report has no {shown(name)}, must be one of {', '.join(REPORT)}")
        chosen = names or [name for name in REPORT if name != "timeline"]
        return Report(
            **{name: empty_like(like, shapes[REPORT[name][1]], REPORT[name][0]) for name in chosen}
        )

    def selection(self, layer: int, like: Array, capacity: int) -> Selection:
        """A Selection with room for `capacity` tokens per slot and KV head, where `like` lies."""
        heads = self.runtime.kv_heads(layer)
        shape = (self.slots, heads, whole(capacity, "capacity", 0, 2**31))
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
        scores: Array | None = None,
        dense: bool = False,
        partial: Array | None = None,
        rank: int = 0,
        ranks: int = 1,
        stream: Any = None,
    ) -> Array:
        """Writes the new tokens' rows and attends, for every filled slot. Each layer once per step.

        q [slots, q_heads, head_dim_k], unscaled, k_new [slots, kv_heads, head_dim_k] and v_new
        [slots, kv_heads, head_dim_v] in the runtime's dtype, contiguous; k_new is left out iff
        new_tokens was 0, v_new also with shared_kv. Returns `out` [slots, q_heads, head_dim_v] of
        float32, float16 or bfloat16 (by default a new array of the runtime's dtype). Each may
        have a dimension of the step's query tokens after the slots, and has it if those are more
        than one. With index external, and only then, scores [slots,
        q_heads or kv_heads, stride] float32, float16 or bfloat16 predict softmax_scale * q.k of
        every token. With dense every row is read, whatever the runtime's policy is.

        With `partial` the sequences hold slice `rank` of `ranks` of their contexts: the forecasts
        are written there and returned, nothing else is, and `attend_more` follows.

        On CUDA with arrays in device memory the call enqueues on `stream`, by default the one that
        the owner of q works on; the arrays must live until the stream has passed the call. With
        arrays in host memory it blocks.
        """
        given = self._begin(layer, (q, k_new, v_new), report, scores)
        if dense:
            given.params.policy = Policy.DENSE
        if partial is not None:
            given.slice(partial, rank, ranks)
            self._run("vattn_attend", given, None, stream)
            return partial
        out = given.output(out, q)
        self._run("vattn_attend", given, None, stream)
        return out

    def partial(self, layer: int, like: Array) -> Array:
        """An array [slots, q_heads, floats] for the records of a slice, where `like` lies."""
        options = self.runtime._options
        floats = record_floats(options["head_dim_v"])
        return empty_like(like, (self.slots, options["num_q_heads"], floats), "f32")

    def attend_more(
        self,
        layer: int,
        gathered: Array,
        partial: Array,
        *,
        rank: int,
        again: Array | None = None,
        out: Array | None = None,
        report: Report | None = None,
        stream: Any = None,
    ) -> Array:
        """Goes on with the layer that `attend` was the last call for, with `partial`.

        gathered [ranks, slots, q_heads, floats] float32: what all ranks had in `partial`. Takes a
        look at more rows and writes the records of `partial` anew; once all heads have passed,
        writes `out`, which is returned, and the report. again [1] int32
        gets the KV heads that have yet to be answered: with any, the ranks exchange records once
        more and call again. All ranks get the same numbers and answers.
        """
        given = AttendCall(self.runtime, self.slots, layer)
        given.gathered(gathered, again)
        given.slice(partial, rank, view(gathered, "gathered").shape[0])
        out = given.answer(out, partial)
        given.report(report)
        self._run("vattn_attend_more", given, None, stream)
        return out

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
        given = self._begin(layer, (q, k_new, v_new), report, None)
        out = given.output(out, q)
        self._run("vattn_attend_selected", given, given.selection(selection, False), stream)
        return out

    def select(
        self,
        layer: int,
        q: Array,
        k_new: Array | None,
        v_new: Array | None,
        selection: Selection,
        *,
        report: Report | None = None,
        scores: Array | None = None,
        stream: Any = None,
    ) -> None:
        """Fills `selection` with sinks, window and first draw, for engines with their own kernel.

        Of the report `selected` and `middle` are written. FullError if the capacity is too small:
        `counts` then hold the need, and the call may be made again. Needs policy verified.
        """
        given = self._begin(layer, (q, k_new, v_new), report, scores)
        self._run("vattn_select", given, given.selection(selection, True), stream)

    def _begin(
        self,
        layer: int,
        rows: tuple[Array, Array | None, Array | None],
        report: Report | None,
        scores: Array | None,
    ) -> AttendCall:
        given = AttendCall(self.runtime, self.slots, layer)
        given.rows(*rows)
        given.report(report)
        given.scores(scores)
        return given

    def _run(
        self, name: str, given: AttendCall, lists: c.SelectionParams | None, stream: Any
    ) -> None:
        arguments = [ctypes.byref(given.params)]
        if lists is not None:
            arguments.append(ctypes.byref(lists))
        call(name, self.handle, *arguments, stream_handle(stream, given.views))
