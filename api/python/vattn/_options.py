"""Options of a runtime: what is accepted for each, and what is in force."""

import ctypes
import difflib
import enum
import json
import os
from collections.abc import Iterable
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    SupportsFloat,
    SupportsIndex,
    TypedDict,
    cast,
)

from . import _structs as c
from ._arguments import choice, shown, whole
from ._enums import (
    Admission,
    Backend,
    Bound,
    DType,
    Index,
    Io,
    Norm,
    OnUnverified,
    Policy,
    Target,
)
from ._errors import invalid
from ._library import call, struct

if TYPE_CHECKING:
    import numpy

    class TorchDType(Protocol):
        """torch.dtype, for type checkers that may not have torch."""

        @property
        def is_floating_point(self) -> bool: ...
        @property
        def itemsize(self) -> int: ...

    AnyDType = (
        DType
        | Literal["f32", "f16", "bf16", "float32", "float16", "bfloat16"]
        | TorchDType
        | numpy.dtype[Any]
        | type[numpy.floating[Any]]
    )
else:
    AnyDType = Any

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Options(TypedDict, total=False):
    """What Runtime takes: the fields of vattn_options in vattn.h, and `preset`.

    Whole numbers and numbers are those of Python, numpy and torch; True and False are 1 and 0.
    """

    preset: Literal["strict", "default", "fast"] | None  # applied first
    num_layers: SupportsIndex
    num_q_heads: SupportsIndex
    num_kv_heads: SupportsIndex
    head_dim_k: SupportsIndex
    head_dim_v: SupportsIndex
    dtype: AnyDType
    shared_kv: SupportsIndex
    softmax_scale: SupportsFloat
    layer_kv_heads: Iterable[SupportsIndex] | None  # None: every layer has num_kv_heads
    backend: Backend | Literal["auto", "cpu", "cuda"]
    device: SupportsIndex
    num_threads: SupportsIndex
    numa_node: SupportsIndex
    huge_pages: SupportsIndex
    prefault: SupportsIndex
    host_bytes: SupportsIndex
    sinks: SupportsIndex
    window: SupportsIndex
    exact_below: SupportsIndex
    index: (
        Index
        | Literal[
            "balanced", "exact", "sign", "hadamard2", "page", "pooled", "clusters", "external"
        ]
    )
    index_bytes: SupportsIndex
    value_bits: SupportsIndex
    policy: Policy | Literal["verified", "topk", "topk_uniform", "dense"]
    norm: Norm | Literal["value", "output"]
    on_unverified: OnUnverified | Literal["dense", "best_effort"]
    bound: Bound | Literal["sharp", "safe"]
    epsilon: SupportsFloat
    delta: SupportsFloat
    norm_floor: SupportsFloat
    max_looks: SupportsIndex
    seed: SupportsIndex
    refresh: SupportsIndex
    min_selected: SupportsIndex
    max_selected_share: SupportsFloat
    topk_share: SupportsFloat
    base_share: SupportsFloat
    target: Target | Literal["sdpa", "numerator", "denominator"]
    hot_share: SupportsFloat
    zero_on_free: SupportsIndex
    profile: Path | None
    disk_path: Path | None
    disk_bytes: SupportsIndex
    spill: SupportsIndex
    io_engine: Io | Literal["auto", "uring", "pread"]
    io_depth: SupportsIndex
    io_block_bytes: SupportsIndex
    io_buffered: SupportsIndex
    io_timeout_ms: SupportsIndex
    sign_maps: Path | None
    pilot: SupportsIndex
    admission: Admission | Literal["overcommit", "reserved"]
    tenant_bytes: SupportsIndex
    first_kv_head: SupportsIndex


class ResolvedOptions(TypedDict):
    """The options in force, every default resolved: Runtime(**options) has the same again."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: DType
    shared_kv: int
    softmax_scale: float
    layer_kv_heads: list[int]  # one number a layer
    backend: Backend
    device: int
    num_threads: int
    numa_node: int
    huge_pages: int
    prefault: int
    host_bytes: int
    sinks: int
    window: int
    exact_below: int
    index: Index
    index_bytes: int
    value_bits: int
    policy: Policy
    norm: Norm
    on_unverified: OnUnverified
    bound: Bound
    epsilon: float
    delta: float
    norm_floor: float
    max_looks: int
    seed: int
    refresh: int
    min_selected: int
    max_selected_share: float
    topk_share: float
    base_share: float
    target: Target
    hot_share: float
    zero_on_free: int
    profile: str  # "": none
    disk_path: str
    disk_bytes: int
    spill: int
    io_engine: Io
    io_depth: int
    io_block_bytes: int
    io_buffered: int
    io_timeout_ms: int
    sign_maps: str
    pilot: int
    admission: Admission
    tenant_bytes: int
    first_kv_head: int


_ENUMS: dict[str, type[enum.IntEnum]] = {
    "dtype": DType,
    "backend": Backend,
    "policy": Policy,
    "index": Index,
    "norm": Norm,
    "on_unverified": OnUnverified,
    "bound": Bound,
    "target": Target,
    "io_engine": Io,
    "admission": Admission,
}
_PATHS = ("profile", "disk_path", "sign_maps")


def check_options(**options: Any) -> c.Options:
    """The struct of `options`: names and types of vattn_options are checked, ranges not yet.

    It keeps alive what its pointers point to.
    """
    value: c.Options = struct(c.Options, "vattn_options_init")
    preset = options.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str):
            raise invalid(f'preset is {shown(preset)}, must be "strict", "default" or "fast"')
        call(
            "vattn_options_from_json", json.dumps({"preset": preset}).encode(), ctypes.byref(value)
        )
    for name, given in options.items():
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, 1)
            raise invalid(f"option {name} is unknown{f', is {near[0]} meant?' if near else ''}")
        if name in _ENUMS:
            setattr(value, name, choice(given, name, _ENUMS[name]))
        elif name != "layer_kv_heads":
            setattr(value, name, given)
    heads = options.get("layer_kv_heads")
    if heads is not None:
        array = _heads(heads, value.num_layers)
        value.point("layer_kv_heads", ctypes.addressof(array), array)
    return value


def _heads(given: Any, num_layers: int) -> Any:
    """KV heads by layer as an array of C, which reads as many as there are layers."""
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
        raise invalid(f"layer_kv_heads is {shown(given)}, must be whole numbers, one a layer")
    heads = [whole(entry, f"layer_kv_heads[{layer}]", 0, 1024) for layer, entry in enumerate(given)]
    if len(heads) != num_layers:
        raise invalid(
            f"layer_kv_heads has {len(heads)} entries, must have num_layers = {num_layers}"
        )
    return (ctypes.c_int32 * num_layers)(*heads)


def resolved(value: c.Options) -> ResolvedOptions:
    """Options as the library gives them back."""
    options: dict[str, Any] = {}
    for name in ResolvedOptions.__annotations__:
        field = getattr(value, name)
        if name in _ENUMS:
            field = _ENUMS[name](field)
        elif name == "layer_kv_heads":
            field = ctypes.cast(field, ctypes.POINTER(ctypes.c_int32))[: value.num_layers]
        elif name in _PATHS:
            field = os.fsdecode(field) if field else ""
        options[name] = field
    return cast(ResolvedOptions, options)
