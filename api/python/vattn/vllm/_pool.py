"""A vattn runtime over the pages that vLLM gave to the layers of one KV cache group."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .._paged import Paged
from .._runtime import Runtime
from ._options import Options
from ._pages import Page


class Pool:
    """Rows and codes of a group's layers, which have the numbers that they have in the model."""

    def __init__(
        self,
        page: Page,
        kv_caches: Sequence[torch.Tensor],
        options: Options,
        *,
        layers: Sequence[int],
        num_layers: int,
        num_q_heads: int,
        first_kv_head: int = 0,
        scale: float,
        max_tokens: int,
        max_requests: int,
        max_query_tokens: int,
        tables: str | None,
        model: str | None,
    ) -> None:
        """kv_caches: vLLM's tensors; layers: the number of each among the model's num_layers, ascending;
        first_kv_head: the number in the model of this rank's first one; max_tokens of a request; the rest as Runtime.paged."""
        device = kv_caches[0].device
        on_cpu = device.type == "cpu"
        own: dict[str, Any] = dict(options.runtime)
        if on_cpu:
            own.setdefault("num_threads", torch.get_num_threads())
        with _all_cores():
            self.runtime = Runtime(
                **own,
                backend="cpu" if on_cpu else "cuda",
                device=device.index or 0,
                num_layers=num_layers,
                num_q_heads=num_q_heads,
                first_kv_head=first_kv_head,
                layer_kv_heads=[page.heads if i in layers else 0 for i in range(num_layers)],
                head_dim_k=page.head_dim_k,
                head_dim_v=page.head_dim_v,
                dtype=page.dtype,
                softmax_scale=scale,
                host_bytes=1 << 26,
            )
        pages = [page.bytes_of(kv_cache) for kv_cache in kv_caches]
        if page.rows:
            rows: Sequence[torch.Tensor] = [page.rows_of(one) for one in pages]
        else:
            rows = page.host_rows(len(pages), len(pages[0]), options.host_bytes)
        k: list[Any] = [None] * num_layers
        v, codes = k.copy(), k.copy()
        for layer, mine, bytes_ in zip(layers, rows, pages, strict=True):
            k[layer] = mine[..., : page.head_dim_k].transpose(1, 2)
            v[layer] = mine[..., page.head_dim_k :].transpose(1, 2)
            codes[layer] = page.codes_of(bytes_)
        self.first_layer = layers[0]
        self.paged: Paged = self.runtime.paged(
            k,
            v,
            max_tokens=max_tokens,
            max_requests=max_requests,
            max_query_tokens=max_query_tokens,
            tables=tables,
            model=model,
            codes=codes if page.code_bytes else None,
            hot_bytes=0 if on_cpu else options.hot_bytes,
        )
        self.prompt_tokens = 0  # attended exactly, in the first layer
        self.step_tokens = 0

    def counters(self) -> dict[str, tuple[str, str, float]]:
        """name -> (kind, text, value), for Prometheus."""
        return {
            "vattn_prompt_tokens": (
                "counter",
                "Prompt tokens, attended exactly",
                self.prompt_tokens,
            ),
            "vattn_step_tokens": ("counter", "Query tokens of decode steps", self.step_tokens),
        }

    def close(self) -> None:
        """Frees the runtime, not vLLM's pages."""
        self.runtime.close()


@contextmanager
def _all_cores() -> Iterator[None]:
    """While the library starts its threads: they inherit this one's cores, and vLLM has bound it to one.

    Threads of the process that run elsewhere say which cores vLLM gave to it.
    """
    mine = os.sched_getaffinity(0)
    cores = set(mine)
    for thread in os.listdir("/proc/self/task"):
        try:
            cores |= os.sched_getaffinity(int(thread))
        except ProcessLookupError:
            continue
    try:
        os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, mine)
