"""The structs, enumerations and functions of api/vattn.h, as ctypes sees them.

tests/python/header_test.py compares every name, type and value here with the header.
"""

import ctypes
import enum
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any


class Status(enum.IntEnum):
    """vattn_code: what went wrong, in `Error.status`."""

    OK = 0
    INVALID_ARGUMENT = 1
    OUT_OF_MEMORY = 2
    NOT_SUPPORTED = 3
    DEVICE_ERROR = 4
    IO_ERROR = 5
    INTERNAL = 6
    FULL = 7
    DEVICE_LOST = 8
    DATA_LOSS = 9
    NOT_FOUND = 10


class DType(enum.IntEnum):
    """Element type of rows, queries and outputs."""

    F32 = 0
    F16 = 1
    BF16 = 2


class Backend(enum.IntEnum):
    """Where a runtime computes."""

    AUTO = 0
    CPU = 1
    CUDA = 2


class Policy(enum.IntEnum):
    """How rows of the middle are chosen."""

    VERIFIED = 0
    TOPK = 1
    TOPK_UNIFORM = 2
    DENSE = 3


class Index(enum.IntEnum):
    """What scores are predicted from."""

    BALANCED = 0
    EXACT = 1
    SIGN = 2
    HADAMARD2 = 3
    PAGE = 4
    POOLED = 5
    CLUSTERS = 6
    EXTERNAL = 7


class Norm(enum.IntEnum):
    """What the relative error is relative to."""

    VALUE = 0
    OUTPUT = 1


class OnUnverified(enum.IntEnum):
    """What happens to a head that could not be verified."""

    DENSE = 0
    BEST_EFFORT = 1


class Bound(enum.IntEnum):
    """Which quantile turns a variance into an error bound."""

    SHARP = 0
    SAFE = 1


class Target(enum.IntEnum):
    """What the sample of policy topk_uniform is sized for."""

    SDPA = 0
    NUMERATOR = 1
    DENOMINATOR = 2


class Io(enum.IntEnum):
    """How files are read and written."""

    AUTO = 0
    URING = 1
    PREAD = 2


class Admission(enum.IntEnum):
    """What a sequence may take from the host pool."""

    OVERCOMMIT = 0
    RESERVED = 1


class Tier(enum.IntEnum):
    """Where stored prefixes are."""

    AUTO = 0
    MEMORY = 1
    DISK = 2


class Verdict(enum.IntEnum):
    """What is known about one query head's output."""

    EXACT = 0
    VERIFIED = 1
    DENSE = 2
    BEST_EFFORT = 3


class LogLevel(enum.IntEnum):
    """Severity of a log line."""

    ERROR = 0
    WARNING = 1
    INFO = 2
    DEBUG = 3


LOG_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)


def _fields(text: str) -> Sequence[tuple[str, Any]]:
    """[(name, ctypes type)] from `type name name ...` lines; a * before a name: a pointer."""
    types = {
        "int32": c_int32,
        "int64": c_int64,
        "uint64": c_uint64,
        "float": c_float,
        "size": c_size_t,
        "text": c_char_p,
        "log": LOG_FUNCTION,
    }
    fields = []
    for line in text.strip().splitlines():
        kind, *names = line.split()
        fields += [
            (name.lstrip("*"), c_void_p if name.startswith("*") else types[kind]) for name in names
        ]
    return fields


class Options(ctypes.Structure):
    """vattn_options."""

    _fields_ = _fields("""
        size struct_size
        int32 num_layers num_q_heads num_kv_heads head_dim_k head_dim_v dtype shared_kv
        float softmax_scale
        int32 *layer_kv_heads
        int32 backend device num_threads numa_node huge_pages prefault
        uint64 host_bytes
        int32 sinks window exact_below
        int32 index index_bytes value_bits
        int32 policy norm on_unverified bound
        float epsilon delta norm_floor
        int32 max_looks
        uint64 seed
        int32 refresh min_selected
        float max_selected_share topk_share base_share
        int32 target
        float hot_share
        int32 zero_on_free
        log log
        void *log_user
        text profile disk_path
        uint64 disk_bytes
        int32 spill io_engine io_depth io_block_bytes io_buffered io_timeout_ms
        text sign_maps
        int32 pilot admission
        uint64 tenant_bytes""")


class SequenceOptions(ctypes.Structure):
    """vattn_sequence_options."""

    _fields_ = _fields("""
        size struct_size
        uint64 id
        int64 reserve_tokens
        uint64 tenant""")


class AppendParams(ctypes.Structure):
    """vattn_append_params."""

    _fields_ = _fields("""
        size struct_size
        int32 layer num_queries
        int64 num_tokens
        void *k *v *q
        int64 k_token_stride k_head_stride v_token_stride v_head_stride
        int64 q_token_stride q_head_stride""")


class Prefix(ctypes.Structure):
    """vattn_prefix."""

    _fields_ = _fields("""
        size struct_size
        void *salt
        uint64 salt_bytes
        int32 *tokens
        int64 num_tokens reserve_tokens
        uint64 tenant
        int32 tier reserved0""")


class AttendParams(ctypes.Structure):
    """vattn_attend_params."""

    _fields_ = _fields("""
        size struct_size
        int32 layer num_tokens out_dtype reserved0
        void *q *k_new *v_new *out
        float *lse
        int32 *verdict
        float *error
        int32 *selected *fetched *looks
        int64 *middle
        uint64 *timeline
        float *scores
        int64 scores_stride
        int32 score_heads reserved1""")


class SelectionParams(ctypes.Structure):
    """vattn_selection."""

    _fields_ = _fields("""
        size struct_size
        int64 capacity
        int32 *tokens
        float *log_weights
        int32 *counts""")


class TenantUseStruct(ctypes.Structure):
    """vattn_tenant_use."""

    _fields_ = _fields("""
        size struct_size
        uint64 host_bytes_limit host_bytes_used host_bytes_reserved sequences
        uint64 full_refusals quota_refusals""")


class StatsStruct(ctypes.Structure):
    """vattn_stats."""

    _fields_ = _fields("""
        size struct_size
        uint64 host_bytes_limit host_bytes_used table_bytes sequences tokens steps
        uint64 heads_exact heads_verified heads_dense heads_best_effort
        uint64 rows_middle rows_selected rows_fetched bytes_fetched looks
        uint64 full_refusals blocks_copied
        uint64 disk_bytes_used saves bytes_saved restores bytes_restored spills spill_failures
        uint64 files_refused io_errors prefixes_stored prefix_evictions prefix_hits prefix_tokens
        uint64 prefix_misses prefix_damaged prefix_unread prefix_unlike
        uint64 device_bytes_reserved device_bytes_mapped device_growths device_growth_ns
        uint64 host_bytes_reserved quota_refusals
        uint64 kept_prefixes prefixes_kept kept_evictions kept_hits
        uint64 segments_learnt index_floods segments_recoded outliers heads_noisy""")


def _text_call(*arguments: Any) -> list[Any]:
    """Arguments of a call that writes text: ..., buffer, size, needed."""
    return [*arguments, c_void_p, c_size_t, POINTER(c_size_t)]


_OUT = POINTER(c_void_p)

# name -> (result, arguments). A result of Status is a vattn_code.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "vattn_last_error": (c_char_p, []),
    "vattn_code_name": (c_char_p, [c_int32]),
    "vattn_version": (c_char_p, []),
    "vattn_build_info": (c_char_p, []),
    "vattn_options_init": (None, [POINTER(Options), c_size_t]),
    "vattn_options_from_json": (Status, [c_char_p, POINTER(Options)]),
    "vattn_runtime_create": (Status, [POINTER(Options), _OUT]),
    "vattn_runtime_create_json": (Status, [c_char_p, _OUT]),
    "vattn_runtime_destroy": (None, [c_void_p]),
    "vattn_runtime_options": (Status, [c_void_p, POINTER(Options)]),
    "vattn_doctor": (Status, _text_call()),
    "vattn_sequence_options_init": (None, [POINTER(SequenceOptions), c_size_t]),
    "vattn_sequence_create": (Status, [c_void_p, POINTER(SequenceOptions), _OUT]),
    "vattn_sequence_destroy": (None, [c_void_p]),
    "vattn_sequence_reserve": (Status, [c_void_p, c_int64]),
    "vattn_sequence_fork": (Status, [c_void_p, c_uint64, _OUT]),
    "vattn_sequence_truncate": (Status, [c_void_p, c_int64]),
    "vattn_sequence_length": (Status, [c_void_p, c_int32, POINTER(c_int64)]),
    "vattn_append_params_init": (None, [POINTER(AppendParams), c_size_t]),
    "vattn_append": (Status, [c_void_p, POINTER(AppendParams)]),
    "vattn_sequence_build_index": (Status, [c_void_p]),
    "vattn_sequence_save": (Status, [c_void_p, c_char_p]),
    "vattn_sequence_restore": (Status, [c_void_p, c_char_p, _OUT]),
    "vattn_sequence_restore_as": (
        Status,
        [c_void_p, c_char_p, POINTER(SequenceOptions), _OUT],
    ),
    "vattn_sequence_hibernate": (Status, [c_void_p, c_char_p]),
    "vattn_sequence_wake": (Status, [c_void_p]),
    "vattn_prefix_init": (None, [POINTER(Prefix), c_size_t]),
    "vattn_prefix_save": (Status, [c_void_p, POINTER(Prefix)]),
    "vattn_prefix_restore": (
        Status,
        [c_void_p, POINTER(Prefix), c_uint64, POINTER(c_int64), _OUT],
    ),
    "vattn_prefix_forget": (Status, [c_void_p, c_char_p, c_uint64, POINTER(c_int64)]),
    "vattn_tenant_limit": (Status, [c_void_p, c_uint64, c_uint64]),
    "vattn_tenant_stats": (Status, [c_void_p, c_uint64, POINTER(TenantUseStruct), c_size_t]),
    "vattn_batch_create": (Status, [c_void_p, c_int32, _OUT]),
    "vattn_batch_destroy": (None, [c_void_p]),
    "vattn_batch_set": (Status, [c_void_p, c_int32, c_void_p]),
    "vattn_batch_clear": (Status, [c_void_p, c_int32]),
    "vattn_batch_begin_step": (Status, [c_void_p, c_int32, c_void_p]),
    "vattn_attend_params_init": (None, [POINTER(AttendParams), c_size_t]),
    "vattn_attend": (Status, [c_void_p, POINTER(AttendParams), c_void_p]),
    "vattn_selection_init": (None, [POINTER(SelectionParams), c_size_t]),
    "vattn_attend_selected": (
        Status,
        [c_void_p, POINTER(AttendParams), POINTER(SelectionParams), c_void_p],
    ),
    "vattn_select": (Status, [c_void_p, POINTER(AttendParams), POINTER(SelectionParams), c_void_p]),
    "vattn_runtime_stats": (Status, [c_void_p, POINTER(StatsStruct), c_size_t]),
    "vattn_stats_prometheus": (Status, _text_call(c_void_p)),
}
