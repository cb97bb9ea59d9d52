"""Sequences."""

import ctypes
from typing import Any, Self

from . import _structs as c
from ._arrays import Array, View, dense_view, empty_like, spaced_view
from ._enums import Tier
from ._errors import Error, invalid
from ._handle import Child
from ._library import call, made, struct
from ._options import Path
from ._runtime import DTYPE_NAMES, AnyTier, prefix_of


class Sequence(Child):
    """One request: its rows of every layer. Used by one thread at a time.

    `copy.copy` and `copy.deepcopy` fork it.
    """

    _destroy = "vattn_sequence_destroy"
    _instead = {
        "pickled": "save writes it to a file, Runtime.restore reads that in another process"
    }

    def __repr__(self) -> str:
        if self.closed:
            return "<vattn.Sequence, closed>"
        heads = self.runtime.options["layer_kv_heads"]
        try:
            tokens = [self.length(layer) for layer, count in enumerate(heads) if count > 0]
        except Error as error:
            return f"<vattn.Sequence, {error}>"
        least, most = min(tokens, default=0), max(tokens, default=0)
        return f"<vattn.Sequence of {most if least == most else f'{least} to {most}'} tokens>"

    def __copy__(self) -> Self:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    def append(self, layer: int, k: Array, v: Array | None = None, q: Array | None = None) -> None:
        """Adds prompt tokens to one layer, in chunks of any size; returns when they are copied.

        k [tokens, kv_heads, head_dim_k], post-RoPE, and v [tokens, kv_heads, head_dim_v] in the
        runtime's dtype; v is left out with shared_kv. q [queries, q_heads, head_dim_k], post-RoPE
        and unscaled, are the queries of the last tokens of k: they calibrate the index; pass those of
        all tokens where they are at hand. The last dimension is contiguous, the others have any strides;
        arrays of numpy and torch that are broadcast or reversed along these are copied first. On
        CUDA k and v, and q apart from them, may be in device memory: of torch's tensors the current
        stream is waited for, of others what writes them must have ended. FullError: nothing was
        added and the sequence goes on as before.
        """
        params = struct(c.AppendParams, "vattn_append_params_init")
        params.layer = layer
        given = self._given(params, layer, k, v, q)
        if "q" in given:
            params.num_queries = given["q"].shape[0]
        call("vattn_append", self.handle, ctypes.byref(params))

    def prefill(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array | None = None,
        *,
        out: Array | None = None,
        lse: Array | None = None,
    ) -> Array:
        """Adds prompt tokens to one layer and attends with each of them, exactly.

        A token sees those that the layer had before and the new ones up to its own, so that a prompt
        in chunks gets the answers of one in one piece. q [tokens, q_heads, head_dim_k], k and v as
        in `append`; 1 to 65536 tokens. Returns `out` [tokens, q_heads, head_dim_v] of float32,
        float16 or bfloat16 (by default a new array of the runtime's dtype); lse [tokens, q_heads]
        float32 becomes ln(sum exp(s)). FullError: nothing was added. NotSupportedError on CUDA with
        rows of float32 or head dimensions over 256.
        """
        options = self.runtime._options
        params = struct(c.PrefillParams, "vattn_prefill_params_init")
        params.layer = layer
        given = self._given(params, layer, k, v, q)
        tokens = given["k"].shape[0]
        if given["q"].shape[0] != tokens:
            raise invalid(f"q has {given['q'].shape[0]} tokens, must have the {tokens} of k")
        shape = tokens, options["num_q_heads"], options["head_dim_v"]
        if out is None:
            out = empty_like(q, shape, DTYPE_NAMES[options["dtype"]])
        answers = self._written(out, "out", shape, ("f32", "f16", "bf16"))
        params.out = answers.pointer
        params.out_dtype = next(k for k, name in DTYPE_NAMES.items() if name == answers.dtype)
        if lse is not None:
            params.lse = self._written(lse, "lse", shape[:2], ("f32",)).pointer
        call("vattn_prefill", self.handle, ctypes.byref(params))
        return out

    def _given(
        self,
        params: c.AppendParams | c.PrefillParams,
        layer: int,
        k: Array,
        v: Array | None,
        q: Array | None,
    ) -> dict[str, View]:
        """Puts the arrays that are given, their strides and the number of tokens into params."""
        options = self.runtime._options
        heads = self.runtime.kv_heads(layer)
        keys = self._rows(k, "k", heads, options["head_dim_k"])
        given = {"k": keys}
        if v is not None:
            given["v"] = self._rows(v, "v", heads, options["head_dim_v"])
            if given["v"].shape[0] != keys.shape[0]:
                raise invalid(
                    f"v has {given['v'].shape[0]} tokens, must have the {keys.shape[0]} of k"
                )
        if q is not None:
            given["q"] = self._rows(q, "q", options["num_q_heads"], options["head_dim_k"])
        params.num_tokens = keys.shape[0]
        for name, array in given.items():
            setattr(params, name, array.pointer)
            for stride, extent, kind in zip(array.strides, array.shape, ("token", "head")):
                # In C 0 is "contiguous". An extent of 1 may have any stride in numpy, even below 0.
                setattr(params, f"{name}_{kind}_stride", stride if extent > 1 else 0)
            _wait(array)
        return given

    def _written(
        self, array: Array, name: str, shape: tuple[int, ...], kinds: tuple[str, ...]
    ) -> View:
        taken = dense_view(array, name, (shape,), kinds, written=True)
        self.runtime.check_place(taken, name)
        return taken

    def _rows(self, array: Array, name: str, heads: int, dim: int) -> View:
        rows = spaced_view(array, name, 2)
        if len(rows.shape) != 3 or rows.shape[1:] != (heads, dim):
            raise invalid(f"{name} has shape {list(rows.shape)}, must be [tokens, {heads}, {dim}]")
        if rows.strides[2] != 1 and dim > 1:
            raise invalid(
                f"{name} has strides {list(rows.strides)}, must have 1 for the last dimension"
            )
        if rows.dtype != DTYPE_NAMES[self.runtime._options["dtype"]]:
            raise invalid(
                f"{name} has elements of {rows.dtype}, must be "
                f"{DTYPE_NAMES[self.runtime._options['dtype']]} as the runtime's are"
            )
        self.runtime.check_place(rows, name)
        return rows

    def reserve(self, tokens: int) -> None:
        """Sets aside all blocks that it still needs to have `tokens` tokens in every layer.

        In place of what it had set aside before; 0 gives that back. Until it has more tokens,
        appends and steps cannot raise FullError. See vattn_sequence_reserve in vattn.h.
        """
        call("vattn_sequence_reserve", self.handle, tokens)

    def fork(self, id: int = 0) -> Self:
        """A second sequence with the same tokens. Blocks are shared until one of the two writes."""
        return type(self)(self.runtime, made("vattn_sequence_fork", self.handle, id))

    def truncate(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens of every layer; layers that have fewer are left alone."""
        call("vattn_sequence_truncate", self.handle, tokens)

    def length(self, layer: int = 0) -> int:
        """Tokens that one layer holds."""
        tokens = ctypes.c_int64()
        call("vattn_sequence_length", self.handle, layer, ctypes.byref(tokens))
        return tokens.value

    def build_index(self) -> None:
        """Codes every token that has left the window; else the first step after an append does."""
        call("vattn_sequence_build_index", self.handle)

    def save(self, path: Path) -> None:
        """Writes rows, codes and tables to a file that appears whole or not at all."""
        call("vattn_sequence_save", self.handle, path)

    def save_tables(self, path: Path, model: str = "") -> None:
        """Learns tables from the rows and queries, for pools of an engine's own (`Runtime.paged`).

        They are those of a text, the longer the better, with the queries of all of it; every layer
        needs 1024 tokens or more in its middle. model: what the caller calls the model, say a
        fingerprint of its weights and position encoding; `Runtime.paged` compares it. The file
        appears whole or not at all.
        """
        call("vattn_tables_save", self.handle, path, model)

    def save_prefix(self, salt: bytes, tokens: Array, tier: AnyTier = Tier.AUTO) -> None:
        """Stores the sequence's first tokens in the runtime's disk_path, or in the host pool.

        The pool serves where there is no disk_path, or with tier MEMORY: blocks are shared, and
        let go, those unused for longest first, when room is wanted. tokens [tokens] int32 are
        their ids, for which the caller vouches. The salt, 1 to 4096 bytes, names the model with its
        weights and position encoding, and the tenant: only calls with the same one find the prefix.
        FullError if disk_bytes, or the pool, has no room.
        """
        prefix = prefix_of(salt, tokens, tier)
        call("vattn_prefix_save", self.handle, ctypes.byref(prefix))

    def hibernate(self, path: Path) -> None:
        """Saves, then frees the host blocks; any use but `length` wakes the sequence first.

        Refused while it sits in a batch.
        """
        call("vattn_sequence_hibernate", self.handle, path)

    def wake(self) -> None:
        """Brings a hibernated sequence back from its file, which is left in place."""
        call("vattn_sequence_wake", self.handle)


def _wait(array: View) -> None:
    """Waits for what writes an array of torch on a CUDA device."""
    if array.device >= 0 and hasattr(array.owner, "data_ptr"):
        import torch

        torch.cuda.current_stream(array.device).synchronize()
