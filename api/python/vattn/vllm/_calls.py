"""The two calls that every layer makes in every step, without what they cost when arguments are checked.

A token of a small model has some 60 of them, and looking at an array as `Paged` does takes longer than a
step's work on it. Arguments are therefore checked where they are of a new kind: of another type, place,
shape or stride than those that have passed before.
"""

import ctypes
from typing import Any

import torch

from .. import _structs as c
from .._enums import DType
from .._errors import error_of
from .._library import LIBRARY, struct
from .._paged import Paged

_TYPES = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16}
_set = ctypes.Structure.__setattr__  # without the checks of Struct


class LayerCalls:
    """The calls of one layer of a pool."""

    def __init__(self, paged: Paged, layer: int) -> None:
        self._paged, self._layer = paged, layer
        self._rows: c.PagedRows = struct(c.PagedRows, "vattn_paged_rows_init")
        self._params: c.AttendParams = struct(c.AttendParams, "vattn_attend_params_init")
        self._rows.layer = self._params.layer = layer
        self._passed: set[tuple[Any, ...]] = set()

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """As Paged.write."""
        several = len(slots) > 1
        kind = (several, _kind(slots), _kind(key), _kind(value))
        if kind not in self._passed:
            self._paged.write(self._layer, slots, key, value)
            self._passed.add(kind)
            return
        rows = self._rows
        _set(rows, "num_tokens", len(slots))
        _set(rows, "slots", slots.data_ptr())
        for name, array in (("k", key), ("v", value)):
            _set(rows, name, array.data_ptr())
            _set(rows, f"{name}_token_stride", array.stride(0) if several else 0)
            _set(rows, f"{name}_head_stride", array.stride(1) if array.shape[1] > 1 else 0)
        self._call("vattn_paged_write", rows, key)

    def attend(self, query: torch.Tensor, output: torch.Tensor, most_queries: int) -> None:
        """As Paged.attend with `out`; most_queries: the open step's max_query_tokens."""
        kind = (_kind(query), _kind(output))
        if kind not in self._passed:
            self._paged.attend(self._layer, query, out=output)
            self._passed.add(kind)
            return
        params = self._params
        _set(params, "num_tokens", most_queries)
        _set(params, "q", query.data_ptr())
        _set(params, "out", output.data_ptr())
        _set(params, "out_dtype", int(_TYPES[output.dtype]))
        self._call("vattn_paged_attend", params, query)

    def _call(self, name: str, given: c.Struct, like: torch.Tensor) -> None:
        stream = None
        if like.is_cuda:
            stream = torch.cuda.current_stream(like.device).cuda_stream
        code = getattr(LIBRARY, name)(self._paged.handle, ctypes.byref(given), stream)
        if code:
            raise error_of(code, LIBRARY.vattn_last_error().decode(errors="replace"))


def _kind(array: torch.Tensor) -> tuple[Any, ...]:
    return array.dtype, array.device, array.shape[1:], array.stride()
