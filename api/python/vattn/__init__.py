"""vattn: decode attention over long contexts with most of the KV cache outside the accelerator.

    runtime = vattn.Runtime(num_q_heads=8, num_kv_heads=2, head_dim_k=64, head_dim_v=64,
                            dtype="f32")
    sequence = runtime.sequence()
    sequence.append(0, k, v)                  # k, v [tokens, 2, 64]
    batch = runtime.batch(1)
    batch.set(0, sequence)
    batch.begin_step()
    report = batch.report(0, q)
    out = batch.attend(0, q, k_new, v_new, report=report)   # q [1, 8, 64] -> out [1, 8, 64]

Arrays are those of numpy, of torch, or any that offer DLPack or __cuda_array_interface__; they are
used where they lie. api/vattn.h is the reference for terms, options and limits.
`vattn.transformers` runs language models of the package transformers on it.

The library is the file named by VATTN_LIBRARY, else the one in this package, else the system's.
"""

import json
from typing import Any

from . import _library
from ._arrays import Array
from ._attend import TIMELINE_MARKS, Report, Selection
from ._batch import Batch
from ._enums import (
    Admission,
    Backend,
    Bound,
    DType,
    Index,
    Io,
    LogLevel,
    Norm,
    OnUnverified,
    Partial,
    PartialFlag,
    Policy,
    Status,
    Target,
    Tier,
    Verdict,
)
from ._errors import Error, FullError, InvalidArgumentError, NotSupportedError, OutOfMemoryError
from ._options import Options, ResolvedOptions
from ._paged import Paged
from ._runtime import Runtime, Stats, TenantUse
from ._sequence import Sequence
from ._version import __version__

__all__ = [
    "TIMELINE_MARKS",
    "Admission",
    "Array",
    "Backend",
    "Batch",
    "Bound",
    "DType",
    "Error",
    "FullError",
    "Index",
    "InvalidArgumentError",
    "Io",
    "LogLevel",
    "Norm",
    "NotSupportedError",
    "OnUnverified",
    "Options",
    "OutOfMemoryError",
    "Paged",
    "Partial",
    "PartialFlag",
    "Policy",
    "Report",
    "ResolvedOptions",
    "Runtime",
    "Selection",
    "Sequence",
    "Stats",
    "Status",
    "Target",
    "TenantUse",
    "Tier",
    "Verdict",
    "__version__",
    "build_info",
    "devices",
    "doctor",
    "version",
]


def version() -> str:
    """Version of the library, as 0.1.0."""
    return str(_library.LIBRARY.vattn_version().decode())


def build_info() -> str:
    """What the library was built with: commit, compiler, backends."""
    return str(_library.LIBRARY.vattn_build_info().decode())


def doctor() -> dict[str, Any]:
    """What this machine offers: CPU, memory, huge pages, locked memory, io_uring, CUDA, advice."""
    report = json.loads(_library.text("vattn_doctor"))
    assert isinstance(report, dict)
    return report


def devices() -> list[dict[str, Any]]:
    """The CUDA devices, with name, compute capability and memory; empty without CUDA."""
    found = doctor()["cuda"]["devices"]
    assert isinstance(found, list)
    return found


# Seen from outside, also in error texts and pickles, they are all of this module.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith(f"{__name__}."):
        globals()[_name].__module__ = __name__
