"""Runtimes."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Unpack

from . import _structs as c
from ._arguments import choice, salt_bytes, shown, whole
from ._arrays import Array, View, view
from ._enums import Backend, DType, LogLevel, Tier
from ._errors import invalid
from ._handle import Handle
from ._library import LIBRARY, call, made, struct, text
from ._options import Options, Path, ResolvedOptions, resolved
from ._options import check_options as check_options

if TYPE_CHECKING:
    from ._attend import Report
    from ._batch import Batch
    from ._paged import Layers, Paged
    from ._sequence import Sequence

LogFunction = Callable[[LogLevel, str], None]

AnyTier = Tier | Literal["auto", "memory", "disk"]

DTYPE_NAMES = {DType.F32: "f32", DType.F16: "f16", DType.BF16: "bf16"}


@dataclass(frozen=True)
class Stats:
    """Counters of a runtime since it was made; see vattn_stats in vattn.h."""

    host_bytes_limit: int
    host_bytes_used: int  # in blocks that a sequence holds or has reserved
    host_bytes_reserved: int  # of them: reserved and not yet in use
    table_bytes: int  # block tables, index tables, controller state
    full_refusals: int  # calls answered FULL for want of host memory
    quota_refusals: int  # of them: for a tenant's quota
    blocks_copied: int  # shared blocks copied on write
    device_bytes_reserved: int  # addresses set aside for what grows with the tokens, on CUDA
    device_bytes_mapped: int  # device memory taken for them so far
    device_growths: int  # times that more was taken
    device_growth_ns: int  # how long that took
    sequences: int  # alive
    tokens: int  # over sequences and layers
    steps: int  # attend calls x filled slots
    heads_exact: int  # query heads by verdict
    heads_verified: int
    heads_dense: int
    heads_best_effort: int
    heads_noisy: int  # of heads_dense and heads_best_effort: codes too coarse for the query
    rows_middle: int  # rows that dense attention would have read from the middle
    rows_selected: int  # rows read
    rows_fetched: int  # of them not in the hot set
    bytes_fetched: int
    looks: int  # draws, over KV heads
    segments_learnt: int  # parts of indices learnt from their tokens, over layers
    index_floods: int  # of them learnt early, because new tokens were unlike those before
    segments_recoded: int  # parts whose tokens were coded again by new tables
    segments_refused: int  # parts that were due where an index had too many, over layers
    outliers: int  # tokens coded as outliers, each time that they are coded: read in every step
    disk_bytes_used: int  # files in disk_path, written or promised
    saves: int  # sequence files written: saved, hibernated, spilled, prefixes
    bytes_saved: int
    restores: int  # sequences read from such files
    bytes_restored: int  # in their blocks
    spills: int
    spill_failures: int
    files_refused: int  # files to restore that failed their check
    io_errors: int  # file operations that the system refused
    prefix_hits: int  # calls of restore_prefix that found one
    prefix_tokens: int  # tokens that those began with
    prefix_misses: int  # calls answered NOT_FOUND
    prefix_mismatches: int  # digests that led to other tokens
    memory_prefixes: int  # in the host pool now
    memory_prefix_hits: int  # of prefix_hits: from the host pool
    memory_prefixes_saved: int
    memory_prefixes_evicted: int  # let go for room
    disk_prefixes_saved: int
    disk_prefixes_evicted: int  # removed for room
    disk_prefixes_damaged: int  # failed their check and were removed
    disk_prefixes_unread: int  # could not be read by the system when wanted
    requests_refused: int  # of steps of `Paged` on CUDA whose arrays were out of range


@dataclass(frozen=True)
class TenantUse:
    """What a tenant holds; see vattn_tenant_use in vattn.h."""

    host_bytes_limit: int  # 0: none
    host_bytes_used: int  # in blocks that its sequences took or have reserved
    host_bytes_reserved: int  # of them, reserved and not yet in use
    sequences: int
    full_refusals: int
    quota_refusals: int


def prefix_of(salt: bytes, tokens: Array, tier: AnyTier) -> c.Prefix:
    """What a stored prefix is found by: salt of 1 to 4096 bytes, tokens [tokens] int32."""
    ids = view(tokens, "tokens")
    if len(ids.shape) != 1 or ids.dtype != "i32" or not ids.contiguous() or ids.device >= 0:
        raise invalid(
            f"tokens are {list(ids.shape)} elements of {ids.dtype}, must be [tokens] of i32, "
            "contiguous and in host memory"
        )
    value: c.Prefix = struct(c.Prefix, "vattn_prefix_init")
    given = salt_bytes(salt)
    buffer = ctypes.create_string_buffer(given, len(given))
    value.point("salt", ctypes.addressof(buffer), buffer)
    value.salt_bytes = len(given)
    value.point("tokens", ids.pointer, ids)
    value.num_tokens = ids.shape[0]
    value.tier = choice(tier, "tier", Tier)
    return value


def _sequence_options(id: int, reserve_tokens: int, tenant: int) -> c.SequenceOptions:
    chosen: c.SequenceOptions = struct(c.SequenceOptions, "vattn_sequence_options_init")
    chosen.id, chosen.reserve_tokens, chosen.tenant = id, reserve_tokens, tenant
    return chosen


class Runtime(Handle):
    """One device or CPU: the pool for all rows, the options, the counters. Serves many threads.

    Options are the fields of vattn_options by name (vattn.h lists them with their limits), enums as
    members or by lower-case name:

        Runtime(num_layers=28, num_q_heads=12, num_kv_heads=2, head_dim_k=128, head_dim_v=128,
                dtype="bf16", policy="verified", epsilon=.1, delta=.05, host_bytes=4 << 30)

    `dtype` may be one of torch or numpy, paths may be None. `Runtime(**runtime.options)` has the
    same options. `log` is called as log(level, message) on the thread of the call that caused the
    line. Raises InvalidArgumentError, OutOfMemoryError, NotSupportedError or Error.
    """

    _instead = {
        "copied": "Runtime(**runtime.options) makes another one with the same options",
        "pickled": "Runtime(**runtime.options) makes one in another process",
    }

    def __init__(self, *, log: LogFunction | None = None, **options: Unpack[Options]) -> None:
        chosen = check_options(**options)
        if log is not None:
            if not callable(log):
                raise invalid(f"log is {shown(log)}, must be a function of level and message")
            self._log = c.LOG_FUNCTION(
                lambda _, level, message: log(LogLevel(level), message.decode(errors="replace"))
            )
            chosen.log = self._log
        # Its children by handle: how each is destroyed.
        self._open: dict[int, Callable[[int], None]] = {}
        super().__init__(made("vattn_runtime_create", ctypes.byref(chosen)))
        chosen = struct(c.Options, "vattn_options_init")
        call("vattn_runtime_options", self.handle, ctypes.byref(chosen))
        self._options = resolved(chosen)

    def __repr__(self) -> str:
        if self.closed:
            return "<vattn.Runtime, closed>"
        o = self._options
        return (
            f"<vattn.Runtime on {o['backend'].name.lower()}, num_layers {o['num_layers']}, "
            f"dtype {DTYPE_NAMES[o['dtype']]}, policy {o['policy'].name.lower()}>"
        )

    @property
    def options(self) -> ResolvedOptions:
        """The options in force, every default resolved; layer_kv_heads has one number a layer."""
        return self._options | {"layer_kv_heads": list(self._options["layer_kv_heads"])}

    def sequence(self, id: int = 0, reserve_tokens: int = 0, tenant: int = 0) -> "Sequence":
        """An empty sequence.

        id keys its random numbers, 0: a number of the runtime's own. Blocks for reserve_tokens
        tokens in every layer are set aside now (Sequence.reserve). What it takes counts for the
        tenant, under its quota; 0: nobody's. FullError: nothing is created.
        """
        from ._sequence import Sequence

        chosen = _sequence_options(id, reserve_tokens, tenant)
        return Sequence(self, made("vattn_sequence_create", self.handle, ctypes.byref(chosen)))

    def restore(
        self, path: Path, id: int = 0, reserve_tokens: int = 0, tenant: int = 0
    ) -> "Sequence":
        """A saved sequence, read back: attention on it is bit-identical.

        id 0: the saved one; the rest as in `sequence`. Error with status NOT_FOUND: no such file;
        DATA_LOSS: cut short, changed or of another layout.
        """
        from ._sequence import Sequence

        chosen = ctypes.byref(_sequence_options(id, reserve_tokens, tenant))
        handle = made("vattn_sequence_restore_as", self.handle, path, chosen)
        return Sequence(self, handle)

    def restore_prefix(
        self,
        salt: bytes,
        tokens: Array,
        id: int = 0,
        reserve_tokens: int = 0,
        tenant: int = 0,
        tier: AnyTier = Tier.AUTO,
    ) -> tuple["Sequence", int]:
        """A new sequence that begins with what a stored prefix has in common with `tokens`.

        tokens [tokens] int32 are ids from the first on; only prefixes saved with the same salt are
        found. Returns the sequence and how many tokens it begins with, 256 at least; the rest as
        in `sequence`. Error with status NOT_FOUND: none serves.
        """
        from ._sequence import Sequence

        prefix = prefix_of(salt, tokens, tier)
        prefix.reserve_tokens, prefix.tenant = reserve_tokens, tenant
        begins = ctypes.c_int64()
        handle = ctypes.c_void_p()
        call(
            "vattn_prefix_restore",
            self.handle,
            ctypes.byref(prefix),
            id,
            ctypes.byref(begins),
            ctypes.byref(handle),
        )
        assert handle.value is not None
        return Sequence(self, handle.value), begins.value

    def forget_prefixes(self, salt: bytes) -> int:
        """Removes all prefixes stored under a salt; returns how many."""
        prefixes = ctypes.c_int64()
        given = salt_bytes(salt)
        call("vattn_prefix_forget", self.handle, given, len(given), ctypes.byref(prefixes))
        return prefixes.value

    def limit_tenant(self, tenant: int, host_bytes: int) -> None:
        """A limit of a tenant's own on the host pool, in place of the option tenant_bytes.

        host_bytes 0: tenant_bytes again. A tenant above its limit keeps what it has.
        """
        call("vattn_tenant_limit", self.handle, tenant, host_bytes)

    def tenant_use(self, tenant: int) -> TenantUse:
        """What a tenant holds now; one never heard of holds nothing."""
        use = c.TenantUseStruct()
        call("vattn_tenant_stats", self.handle, tenant, ctypes.byref(use), ctypes.sizeof(use))
        return TenantUse(**{field.name: getattr(use, field.name) for field in fields(TenantUse)})

    def batch(self, slots: int) -> "Batch":
        """A batch with room for `slots` sequences, 1 to 4096."""
        from ._batch import Batch

        return Batch(self, made("vattn_batch_create", self.handle, slots), int(slots))

    def paged(
        self,
        k: "Layers",
        v: "Layers | None" = None,
        *,
        max_tokens: int,
        max_requests: int = 64,
        max_query_tokens: int = 1,
        max_step_tokens: int = 0,
        tables: Path | None = None,
        model: str | None = None,
        codes: "Layers | None" = None,
        hot_bytes: int = 0,
        pinned: bool | None = None,
    ) -> "Paged":
        """A pool of KV blocks that the caller owns: attention by its block tables and lengths.

        k [blocks, block_tokens, kv_heads, head_dim_k] and v [blocks, block_tokens, kv_heads,
        head_dim_v] of each layer, by layer: views of any strides of arrays in host memory in the
        runtime's dtype, say both of one packed array; the last dimension is contiguous and the
        strides are the same for K and V and in every layer. None for layers without KV heads; v is
        left out with shared_kv. They are kept alive, not copied.

        tables: file of `Sequence.save_tables`, saved for `model` if that is given; none is needed
        with index external or policy dense. A step has up to max_requests requests of up to
        max_tokens tokens, max_step_tokens together (0: no other limit), with up to max_query_tokens
        (1 to 16) query tokens each. codes: by layer, memory for codes [blocks, bytes] of uint8, on
        CUDA of the device; the library takes it if they are left out. hot_bytes: device memory for
        rows that are kept there. pinned: the pool is page-locked already; None asks torch's tensors.
        See vattn_paged in vattn.h.
        """
        from ._paged import Paged

        return Paged(
            self,
            k,
            v,
            max_tokens=max_tokens,
            max_requests=max_requests,
            max_query_tokens=max_query_tokens,
            max_step_tokens=max_step_tokens,
            tables=tables,
            model=model,
            codes=codes,
            hot_bytes=hot_bytes,
            pinned=pinned,
        )

    def merge(
        self,
        records: Array,
        *,
        out: Array | None = None,
        report: "Report | None" = None,
        stream: Any = None,
    ) -> Array:
        """What the records of all ranks say together, for who exchanges them in another way.

        records [ranks, ..., floats] float32, as `Batch.attend_more` takes them. Returns out
        [..., head_dim_v]; of the report lse, verdict and error [...] are written. A verdict is
        BEST_EFFORT also where another look can follow.
        """
        from ._merge import merge_records

        return merge_records(self, records, out, report, stream)

    def stats(self) -> Stats:
        """The counters now."""
        counters = c.StatsStruct()
        call("vattn_runtime_stats", self.handle, ctypes.byref(counters), ctypes.sizeof(counters))
        return Stats(**{field.name: getattr(counters, field.name) for field in fields(Stats)})

    def prometheus(self) -> str:
        """The counters as Prometheus text."""
        return text("vattn_stats_prometheus", self.handle)

    def kv_heads(self, layer: int) -> int:
        """KV heads of a layer; 0 if it was left out."""
        heads = self._options["layer_kv_heads"]
        return heads[whole(layer, "layer", 0, len(heads) - 1)]

    def check_place(self, array: View, name: str) -> None:
        """Refuses device memory that this runtime cannot reach."""
        options = self._options
        if array.device >= 0 and options["backend"] != Backend.CUDA:
            raise invalid(
                f"{name} is on cuda:{array.device}, must be in host memory: the runtime's backend "
                "is cpu"
            )
        if array.device not in (-1, options["device"]):
            raise invalid(
                f"{name} is on cuda:{array.device}, must be on cuda:{options['device']} as the "
                "runtime is"
            )

    def close(self) -> None:
        """Frees the runtime, after its sequences and batches."""
        handle, self._handle = self._handle, None
        if handle is not None:
            while self._open:
                child, destroy = self._open.popitem()
                destroy(child)
            LIBRARY.vattn_runtime_destroy(handle)
