"""Sequences."""

import ctypes
import os

from . import _structs as c
from ._arrays import Array, View, view
from ._library import call, invalid, made, struct
from ._runtime import DTYPE_NAMES, Handle, Runtime, prefix_of


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
        runtime's dtype; v is left out with shared_kv. q [queries, q_heads, head_dim_k], post-RoPE
        and unscaled, are the queries of the last tokens of k: they calibrate the index; pass those of
        all tokens where they are at hand. Any strides, as long as the last dimension is contiguous. On
        CUDA k and v, and q apart from them, may be in device memory: of torch's tensors the current
        stream is waited for, of others what writes them must have ended. FullError: nothing was
        added and the sequence goes on as before.
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
                raise invalid(
                    f"v has {given['v'].shape[0]} tokens, must have the {keys.shape[0]} of k"
                )
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
        """Codes every token that has left the window; else the first step after an append does."""
        call("vattn_sequence_build_index", self.handle)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes rows, codes and tables to a file that appears whole or not at all."""
        call("vattn_sequence_save", self.handle, os.fsencode(path))

    def save_prefix(self, salt: bytes, tokens: Array, tier: c.Tier = c.Tier.AUTO) -> None:
        """Stores the sequence's first tokens in the runtime's disk_path, or in the host pool.

        The pool serves where there is no disk_path, or with tier MEMORY: blocks are shared, and
        let go, those unused for longest first, when room is wanted. tokens [tokens] int32 are their ids, for which the caller vouches. The salt, 1 to 4096
        bytes, names the model with its weights and position encoding, and the tenant: only calls
        with the same one find the prefix. FullError if disk_bytes, or the pool, has no room.
        """
        prefix = prefix_of(salt, tokens)
        prefix.struct.tier = tier
        call("vattn_prefix_save", self.handle, ctypes.byref(prefix.struct))

    def hibernate(self, path: str | os.PathLike[str]) -> None:
        """Saves, then frees the host blocks; any use but `length` wakes the sequence first.

        Refused while it sits in a batch.
        """
        call("vattn_sequence_hibernate", self.handle, os.fsencode(path))

    def wake(self) -> None:
        """Brings a hibernated sequence back from its file, which is left in place."""
        call("vattn_sequence_wake", self.handle)


def _wait(array: View) -> None:
    """Waits for what writes an array of torch on a CUDA device."""
    if array.device >= 0 and hasattr(array.owner, "data_ptr"):
        import torch

        torch.cuda.current_stream(array.device).synchronize()
