"""The structs and functions of api/vattn.h, as ctypes sees them; its enumerations are in _enums.py.

tests/python/header_test.py compares every name, type and value here with the header.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

from ._arguments import number, path, whole
from ._enums import Status
from ._enums import Verdict as Verdict  # for vattn.transformers

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


_RANGES = {
    c_int32: (-(2**31), 2**31 - 1),
    c_int64: (-(2**63), 2**63 - 1),
    c_uint64: (0, 2**64 - 1),
    c_size_t: (0, 2**64 - 1),
}
# Arguments and fields whose limits in vattn.h are narrower than their type. The library checks them
# too; a text about a number that does not fit the type is to name the same limits.
_LIMITS = {"tokens": (0, 2**31), "reserve_tokens": (0, 2**31)}


def fit(value: Any, name: str, kind: Any) -> Any:
    """What C is given for an argument or a field; refused by name if it is not `value` there."""
    if kind in _RANGES:
        return whole(value, name, *_LIMITS.get(name, _RANGES[kind]))
    if kind is c_float:
        return number(value, name)
    if kind is c_char_p:
        return path(value, name)
    return value


class Struct(ctypes.Structure):
    """A struct of vattn.h: its fields take only what fits."""

    _kinds: dict[str, Any]

    def __init_subclass__(cls) -> None:
        cls._kinds = {field[0]: field[1] for field in cls._fields_}

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._kinds[name]
        absent = (
            value is None and kind is c_char_p
        )  # NULL: options that name a file may be left out
        super().__setattr__(name, None if absent else fit(value, name, kind))

    def point(self, name: str, address: int, owner: Any) -> None:
        """Sets a pointer to memory that `owner` keeps as long as the struct lives."""
        setattr(self, name, address)
        object.__setattr__(self, f"_{name}", owner)


class Options(Struct):
    """vattn_options."""

    _fields_ = _fields("""
        size struct_size
        int32 num_layers num_q_heads num_kv_heads head_dim_k head_dim_v dtype shared_kv
        float softmax_scale
        int32 *layer_kv_heads
        int32 backend device num_threads numa_node
        uint64 host_bytes tenant_bytes
        int32 admission huge_pages prefault zero_on_free
        int32 sinks window exact_below
        int32 index index_bytes value_bits
        text sign_maps profile
        int32 policy norm on_unverified bound
        float epsilon delta norm_floor
        int32 max_looks
        uint64 seed
        int32 pilot refresh min_selected
        float max_selected_share
        float topk_share base_share
        int32 target
        float hot_share
        text disk_path
        uint64 disk_bytes
        int32 spill io_engine io_depth io_block_bytes io_buffered io_timeout_ms
        log log
        void *log_user
        uint64 first_kv_head""")


class SequenceOptions(Struct):
    """vattn_sequence_options."""

    _fields_ = _fields("""
        size struct_size
        uint64 id
        int64 reserve_tokens
        uint64 tenant""")


class AppendParams(Struct):
    """vattn_append_params."""

    _fields_ = _fields("""
        size struct_size
        int32 layer num_queries
        int64 num_tokens
        void *k *v *q
        int64 k_token_stride k_head_stride v_token_stride v_head_stride
        int64 q_token_stride q_head_stride""")


class PrefillParams(Struct):
    """vattn_prefill_params."""

    _fields_ = _fields("""
        size struct_size
        int32 layer out_dtype
        int64 num_tokens
        void *q *k *v
        int64 q_token_stride q_head_stride k_token_stride k_head_stride
        int64 v_token_stride v_head_stride
        void *out
        float *lse""")


class Prefix(Struct):
    """vattn_prefix."""

    _fields_ = _fields("""
        size struct_size
        void *salt
        uint64 salt_bytes
        int32 *tokens
        int64 num_tokens reserve_tokens
        uint64 tenant
        int32 tier reserved0""")


class AttendParams(Struct):
    """vattn_attend_params."""

    _fields_ = _fields("""
        size struct_size
        int32 layer num_tokens out_dtype score_heads
        void *q *k_new *v_new
        void *scores
        int64 scores_stride
        void *out
        float *lse
        int32 *verdict
        float *error
        int32 *selected *fetched *looks
        int64 *middle
        uint64 *timeline
        int32 scores_dtype policy
        float *partial *gathered
        int32 *again
        int32 rank ranks""")


class MergeParams(Struct):
    """vattn_merge_params."""

    _fields_ = _fields("""
        size struct_size
        int64 heads
        float *records
        void *out
        float *lse
        int32 *verdict
        float *error
        int32 *again
        int32 ranks out_dtype""")


class SelectionParams(Struct):
    """vattn_selection."""

    _fields_ = _fields("""
        size struct_size
        int64 capacity
        int32 *tokens
        float *log_weights
        int32 *counts""")


class PagedOptions(Struct):
    """vattn_paged_options."""

    _fields_ = _fields("""
        size struct_size
        text tables model
        void *k *v
        int64 num_blocks block_stride token_stride head_stride
        void *codes
        int64 code_block_stride max_tokens max_step_tokens
        uint64 hot_bytes
        int32 block_tokens max_requests max_query_tokens pinned""")


class PagedRows(Struct):
    """vattn_paged_rows."""

    _fields_ = _fields("""
        size struct_size
        int32 layer reserved0
        int64 num_tokens
        int64 *slots
        void *k *v
        int64 k_token_stride k_head_stride v_token_stride v_head_stride""")


class PagedStep(Struct):
    """vattn_paged_step."""

    _fields_ = _fields("""
        size struct_size
        int32 num_requests max_query_tokens
        int64 num_query_tokens
        int32 *block_table
        int64 block_table_stride
        int32 *lengths *query_starts *request_rows *resets""")


class PagedPrefillParams(Struct):
    """vattn_paged_prefill_params."""

    _fields_ = _fields("""
        size struct_size
        int32 layer out_dtype
        int64 num_tokens length
        int32 *blocks
        void *q
        int64 q_token_stride q_head_stride
        void *out
        float *lse""")


class TenantUseStruct(Struct):
    """vattn_tenant_use."""

    _fields_ = _fields("""
        size struct_size
        uint64 host_bytes_limit host_bytes_used host_bytes_reserved sequences
        uint64 full_refusals quota_refusals""")


class StatsStruct(Struct):
    """vattn_stats."""

    _fields_ = _fields("""
        size struct_size
        uint64 host_bytes_limit host_bytes_used host_bytes_reserved table_bytes
        uint64 full_refusals quota_refusals blocks_copied
        uint64 device_bytes_reserved device_bytes_mapped device_growths device_growth_ns
        uint64 sequences tokens steps
        uint64 heads_exact heads_verified heads_dense heads_best_effort heads_noisy
        uint64 rows_middle rows_selected rows_fetched bytes_fetched looks
        uint64 segments_learnt index_floods segments_recoded segments_refused outliers
        uint64 disk_bytes_used saves bytes_saved restores bytes_restored
        uint64 spills spill_failures files_refused io_errors
        uint64 prefix_hits prefix_tokens prefix_misses prefix_mismatches
        uint64 memory_prefixes memory_prefix_hits memory_prefixes_saved memory_prefixes_evicted
        uint64 disk_prefixes_saved disk_prefixes_evicted disk_prefixes_damaged
        uint64 disk_prefixes_unread
        uint64 requests_refused""")


_OUT = POINTER(c_void_p)

# name -> (result, arguments by name). A result of Status is a vattn_code.
FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vattn_last_error": (c_char_p, {}),
    "vattn_code_name": (c_char_p, {"code": c_int32}),
    "vattn_version": (c_char_p, {}),
    "vattn_build_info": (c_char_p, {}),
    "vattn_options_init": (None, {"options": POINTER(Options), "struct_size": c_size_t}),
    "vattn_options_from_json": (Status, {"json": c_char_p, "options": POINTER(Options)}),
    "vattn_runtime_create": (Status, {"options": POINTER(Options), "out": _OUT}),
    "vattn_runtime_create_json": (Status, {"json": c_char_p, "out": _OUT}),
    "vattn_runtime_destroy": (None, {"runtime": c_void_p}),
    "vattn_runtime_options": (Status, {"runtime": c_void_p, "options": POINTER(Options)}),
    "vattn_doctor": (Status, {"buffer": c_void_p, "size": c_size_t, "needed": POINTER(c_size_t)}),
    "vattn_sequence_options_init": (
        None,
        {"options": POINTER(SequenceOptions), "struct_size": c_size_t},
    ),
    "vattn_sequence_create": (
        Status,
        {"runtime": c_void_p, "options": POINTER(SequenceOptions), "out": _OUT},
    ),
    "vattn_sequence_destroy": (None, {"sequence": c_void_p}),
    "vattn_sequence_reserve": (Status, {"sequence": c_void_p, "tokens": c_int64}),
    "vattn_sequence_fork": (Status, {"sequence": c_void_p, "id": c_uint64, "out": _OUT}),
    "vattn_sequence_truncate": (Status, {"sequence": c_void_p, "tokens": c_int64}),
    "vattn_sequence_length": (
        Status,
        {"sequence": c_void_p, "layer": c_int32, "tokens": POINTER(c_int64)},
    ),
    "vattn_append_params_init": (None, {"params": POINTER(AppendParams), "struct_size": c_size_t}),
    "vattn_prefill_params_init": (
        None,
        {"params": POINTER(PrefillParams), "struct_size": c_size_t},
    ),
    "vattn_append": (Status, {"sequence": c_void_p, "params": POINTER(AppendParams)}),
    "vattn_prefill": (Status, {"sequence": c_void_p, "params": POINTER(PrefillParams)}),
    "vattn_sequence_build_index": (Status, {"sequence": c_void_p}),
    "vattn_sequence_save": (Status, {"sequence": c_void_p, "path": c_char_p}),
    "vattn_sequence_restore": (Status, {"runtime": c_void_p, "path": c_char_p, "out": _OUT}),
    "vattn_sequence_restore_as": (
        Status,
        {"runtime": c_void_p, "path": c_char_p, "options": POINTER(SequenceOptions), "out": _OUT},
    ),
    "vattn_sequence_hibernate": (Status, {"sequence": c_void_p, "path": c_char_p}),
    "vattn_sequence_wake": (Status, {"sequence": c_void_p}),
    "vattn_prefix_init": (None, {"prefix": POINTER(Prefix), "struct_size": c_size_t}),
    "vattn_prefix_save": (Status, {"sequence": c_void_p, "prefix": POINTER(Prefix)}),
    "vattn_prefix_restore": (
        Status,
        {
            "runtime": c_void_p,
            "prefix": POINTER(Prefix),
            "id": c_uint64,
            "tokens": POINTER(c_int64),
            "out": _OUT,
        },
    ),
    "vattn_prefix_forget": (
        Status,
        {
            "runtime": c_void_p,
            "salt": c_void_p,
            "salt_bytes": c_uint64,
            "prefixes": POINTER(c_int64),
        },
    ),
    "vattn_tenant_limit": (
        Status,
        {"runtime": c_void_p, "tenant": c_uint64, "host_bytes": c_uint64},
    ),
    "vattn_tenant_stats": (
        Status,
        {
            "runtime": c_void_p,
            "tenant": c_uint64,
            "use": POINTER(TenantUseStruct),
            "struct_size": c_size_t,
        },
    ),
    "vattn_batch_create": (Status, {"runtime": c_void_p, "slots": c_int32, "out": _OUT}),
    "vattn_batch_destroy": (None, {"batch": c_void_p}),
    "vattn_batch_set": (Status, {"batch": c_void_p, "slot": c_int32, "sequence": c_void_p}),
    "vattn_batch_clear": (Status, {"batch": c_void_p, "slot": c_int32}),
    "vattn_batch_begin_step": (
        Status,
        {"batch": c_void_p, "new_tokens": c_int32, "stream": c_void_p},
    ),
    "vattn_batch_abandon": (Status, {"batch": c_void_p}),
    "vattn_attend_params_init": (None, {"params": POINTER(AttendParams), "struct_size": c_size_t}),
    "vattn_attend": (
        Status,
        {"batch": c_void_p, "params": POINTER(AttendParams), "stream": c_void_p},
    ),
    "vattn_attend_more": (
        Status,
        {"batch": c_void_p, "params": POINTER(AttendParams), "stream": c_void_p},
    ),
    "vattn_merge_params_init": (None, {"params": POINTER(MergeParams), "struct_size": c_size_t}),
    "vattn_merge": (
        Status,
        {"runtime": c_void_p, "params": POINTER(MergeParams), "stream": c_void_p},
    ),
    "vattn_selection_init": (
        None,
        {"selection": POINTER(SelectionParams), "struct_size": c_size_t},
    ),
    "vattn_attend_selected": (
        Status,
        {
            "batch": c_void_p,
            "params": POINTER(AttendParams),
            "selection": POINTER(SelectionParams),
            "stream": c_void_p,
        },
    ),
    "vattn_select": (
        Status,
        {
            "batch": c_void_p,
            "params": POINTER(AttendParams),
            "selection": POINTER(SelectionParams),
            "stream": c_void_p,
        },
    ),
    "vattn_tables_save": (
        Status,
        {"sequence": c_void_p, "path": c_char_p, "model": c_char_p},
    ),
    "vattn_paged_options_init": (
        None,
        {"options": POINTER(PagedOptions), "struct_size": c_size_t},
    ),
    "vattn_paged_create": (
        Status,
        {"runtime": c_void_p, "options": POINTER(PagedOptions), "out": _OUT},
    ),
    "vattn_paged_destroy": (None, {"paged": c_void_p}),
    "vattn_paged_rows_init": (None, {"rows": POINTER(PagedRows), "struct_size": c_size_t}),
    "vattn_paged_write": (
        Status,
        {"paged": c_void_p, "rows": POINTER(PagedRows), "stream": c_void_p},
    ),
    "vattn_paged_step_init": (None, {"step": POINTER(PagedStep), "struct_size": c_size_t}),
    "vattn_paged_begin_step": (
        Status,
        {"paged": c_void_p, "step": POINTER(PagedStep), "stream": c_void_p},
    ),
    "vattn_paged_attend": (
        Status,
        {"paged": c_void_p, "params": POINTER(AttendParams), "stream": c_void_p},
    ),
    "vattn_paged_prefill_params_init": (
        None,
        {"params": POINTER(PagedPrefillParams), "struct_size": c_size_t},
    ),
    "vattn_paged_prefill": (
        Status,
        {"paged": c_void_p, "params": POINTER(PagedPrefillParams)},
    ),
    "vattn_runtime_stats": (
        Status,
        {"runtime": c_void_p, "stats": POINTER(StatsStruct), "struct_size": c_size_t},
    ),
    "vattn_stats_prometheus": (
        Status,
        {"runtime": c_void_p, "buffer": c_void_p, "size": c_size_t, "needed": POINTER(c_size_t)},
    ),
}
