"""Merging the records of several ranks."""

import ctypes
import math
from typing import Any

from . import _structs as c
from ._arrays import Array, View, dense_view, empty_like, stream_handle, view
from ._attend import Report, record_floats
from ._errors import invalid
from ._library import call, struct
from ._runtime import DTYPE_NAMES, Runtime


def merge_records(
    runtime: Runtime, records: Array, out: Array | None, report: Report | None, stream: Any
) -> Array:
    """What Runtime.merge does."""
    options = runtime._options
    extents = view(records, "records").shape
    floats = record_floats(options["head_dim_v"])
    if len(extents) < 2 or extents[-1] != floats:
        raise invalid(f"records have shape {list(extents)}, must be [ranks, ..., {floats}]")
    params: c.MergeParams = struct(c.MergeParams, "vattn_merge_params_init")
    views: list[View] = []

    def take(array: Array, name: str, shape: tuple[int, ...], kinds: tuple[str, ...]) -> View:
        taken = dense_view(array, name, (shape,), kinds, name != "records")
        runtime.check_place(taken, name)
        if views and (taken.device >= 0) != (views[0].device >= 0):
            raise invalid(f"{name} is on another device than records, must be where they are")
        views.append(taken)
        return taken

    params.records = take(records, "records", extents, ("f32",)).pointer
    params.ranks, params.heads = extents[0], math.prod(extents[1:-1])
    shape = (*extents[1:-1], options["head_dim_v"])
    if out is None:
        out = empty_like(records, shape, DTYPE_NAMES[options["dtype"]])
    given = take(out, "out", shape, ("f32", "f16", "bf16"))
    params.out = given.pointer
    params.out_dtype = next(number for number, name in DTYPE_NAMES.items() if name == given.dtype)
    for name, kind in (("lse", "f32"), ("verdict", "i32"), ("error", "f32")):
        array = getattr(report, name, None)
        if array is not None:
            setattr(params, name, take(array, f"report.{name}", shape[:-1], (kind,)).pointer)
    call("vattn_merge", runtime.handle, ctypes.byref(params), stream_handle(stream, views))
    return out
