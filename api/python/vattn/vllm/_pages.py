"""What vLLM's pages hold: codes, and on the CPU the rows beside them."""

import functools
from dataclasses import dataclass

import torch

from .._runtime import Runtime
from ._options import Options


@functools.cache
def _code_bytes(head_dim_k: int, head_dim_v: int, index_bytes: int) -> int:
    """Bytes of a token's code for one KV head, as the library chooses them."""
    with Runtime(
        backend="cpu",
        head_dim_k=head_dim_k,
        head_dim_v=head_dim_v,
        index_bytes=index_bytes,
        host_bytes=1 << 20,
        num_threads=1,
    ) as runtime:
        return runtime.options["index_bytes"]


@dataclass(frozen=True)
class Page:
    """The contents of a page, [heads, tokens, bytes]: first all rows, if they are here, then all codes."""

    heads: int
    tokens: int
    head_dim_k: int
    head_dim_v: int
    dtype: torch.dtype
    rows: bool  # here; else in a pool of host memory
    code_bytes: int  # of a token and head; 0 with policy dense

    @classmethod
    def of(
        cls,
        options: Options,
        *,
        heads: int,
        tokens: int,
        head_dim_k: int,
        head_dim_v: int,
        dtype: torch.dtype,
        on_cpu: bool,
    ) -> "Page":
        """The page for a layer of this shape."""
        codes = 0
        if not options.dense:
            codes = _code_bytes(head_dim_k, head_dim_v, int(options.runtime.get("index_bytes", 0)))
        rows = options.rows == "page" or options.rows == "auto" and on_cpu
        if rows and not on_cpu:
            raise ValueError(
                "additional_config.vattn.rows is page, must be pool or auto on CUDA: rows are in host "
                "memory there"
            )
        return cls(heads, tokens, head_dim_k, head_dim_v, dtype, rows, codes)

    @property
    def row_bytes(self) -> int:
        """Of a token's K and V of one head."""
        return (self.head_dim_k + self.head_dim_v) * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """What vLLM counts for a token and head: `AttentionSpec.state_content_bytes`."""
        # With rows elsewhere and no codes there would be nothing to count tokens by.
        return self.row_bytes * self.rows + self.code_bytes or 16

    def bytes_of(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """[blocks, bytes] uint8 of vLLM's tensor of a layer, [blocks, heads, tokens, elements]."""
        size = self.heads * self.tokens * self.state_bytes
        element = kv_cache.element_size()
        if kv_cache.shape[1] * kv_cache.shape[2] * kv_cache.shape[3] * element != size or (
            not kv_cache[0].is_contiguous()
        ):
            raise ValueError(
                f"vLLM gives pages of shape {list(kv_cache.shape)} and strides "
                f"{list(kv_cache.stride())}, vattn needs {size} contiguous bytes of each"
            )
        flat = torch.empty(0, dtype=torch.uint8, device=kv_cache.device)
        return flat.set_(
            kv_cache.untyped_storage(),
            kv_cache.storage_offset() * element,
            (kv_cache.shape[0], size),
            (kv_cache.stride(0) * element, 1),
        )

    def rows_of(self, pages: torch.Tensor) -> torch.Tensor:
        """[blocks, heads, tokens, K and V] in the model's type, of `bytes_of`."""
        part = pages[:, : self.heads * self.tokens * self.row_bytes].view(self.dtype)
        return part.unflatten(1, (self.heads, self.tokens, self.head_dim_k + self.head_dim_v))

    def codes_of(self, pages: torch.Tensor) -> torch.Tensor | None:
        """[blocks, bytes] uint8, of `bytes_of`."""
        if not self.code_bytes:
            return None
        begin = self.heads * self.tokens * self.row_bytes * self.rows
        return pages[:, begin : begin + self.heads * self.tokens * self.code_bytes]

    def host_rows(self, layers: int, blocks: int, limit: int) -> torch.Tensor:
        """[layers, blocks, heads, tokens, K and V], a pool in host memory for pages without rows."""
        need = layers * blocks * self.heads * self.tokens * self.row_bytes
        if limit and need > limit:
            most = limit // (need // blocks)
            raise ValueError(
                f"rows of {blocks} blocks need {need} bytes of host memory, "
                f"additional_config.vattn.host_bytes is {limit}: add --num-gpu-blocks-override {most}"
            )
        width = self.head_dim_k + self.head_dim_v
        return torch.empty((layers, blocks, self.heads, self.tokens, width), dtype=self.dtype)
