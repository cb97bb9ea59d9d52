"""One KV cache group of vLLM's whose layers are ours: its pool, and the plan of its steps."""

import functools
from typing import TYPE_CHECKING, Any

import torch

from . import _metrics
from ._layer import ServedLayer
from ._options import parse
from ._pages import Page
from ._plan import Plan, Planner
from ._pool import Pool
from ._served import refusal, refuse_config
from ._tables import model_of, tables_of

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

_MOST_QUERIES = 16  # query tokens of a request in a step
_MOST_DEVICE_GROUP = 128  # on CUDA: of all query heads of a KV head together


class Group:
    """Made with vLLM's metadata builder of the group, before there are pages."""

    def __init__(
        self, spec: Any, layers: dict[str, Any], config: Any, device: torch.device
    ) -> None:
        """layers: vLLM's attention layers by name, in the order that they run."""
        self.options = parse(config)
        refuse_config(config, self.options.dense)
        first = next(iter(layers.values()))
        shape = _shape(first)
        for name, layer in layers.items():
            if _shape(layer) != shape:
                raise refusal(f"layers of different shapes: {name} is not as {next(iter(layers))}")
        if first.kv_cache_torch_dtype != config.model_config.dtype:
            raise refusal(
                f"rows of {first.kv_cache_torch_dtype} in a model of {config.model_config.dtype}",
                "leave out --kv-cache-dtype",
            )
        self._page = Page.of(
            self.options,
            heads=first.num_kv_heads,
            tokens=spec.block_size,
            head_dim_k=first.head_size,
            head_dim_v=first.head_size_v,
            dtype=first.kv_cache_torch_dtype,
            on_cpu=device.type == "cpu",
        )
        self._layers, self._config = layers, config
        # A layer's number is in its name, as in model.layers.3.self_attn.attn.
        self._numbers = [int(next(filter(str.isdigit, name.split(".")))) for name in layers]
        if self._numbers != sorted(set(self._numbers)):
            raise refusal(f"layers that are not numbered in their order: {', '.join(layers)}")
        self.max_query_tokens = min(1 + config.num_speculative_tokens, _MOST_QUERIES)
        if device.type != "cpu":
            heads = first.num_heads // first.num_kv_heads
            self.max_query_tokens = max(1, min(self.max_query_tokens, _MOST_DEVICE_GROUP // heads))
        self._max_requests = config.scheduler_config.max_num_seqs
        self._planner = Planner(
            max_requests=self._max_requests,
            max_query_tokens=self.max_query_tokens,
            block_tokens=spec.block_size,
            device=device,
        )
        self.pool: Pool | None = None
        self._pages: dict[str, torch.Tensor] = {}
        # The pool is made as soon as the last layer has its pages: what is wrong with it is told
        # before the engine is ready.
        for name, layer in layers.items():
            layer.bind_kv_cache = functools.partial(self._bind, name, layer)

    def plan(self, m: "CommonAttentionMetadata") -> Plan:
        """The plan of a step."""
        return self._planner.plan(m)

    def _bind(self, name: str, layer: Any, kv_cache: torch.Tensor) -> None:
        type(layer).bind_kv_cache(layer, kv_cache)
        self._pages[name] = kv_cache
        if len(self._pages) < len(self._layers):
            return
        if self.pool is not None:
            _metrics.withdraw(self.pool)
            self.pool.close()
        first, tokens = next(iter(self._layers.values())), self._page.tokens
        tables = tables_of(self.options, self._config)
        self.pool = Pool(
            self._page,
            [self._pages[one] for one in self._layers],
            self.options,
            layers=list(self._numbers),
            num_layers=self._config.model_config.hf_text_config.num_hidden_layers,
            num_q_heads=first.num_heads,
            first_kv_head=_first_kv_head(self._config),
            scale=first.impl.scale,
            # As many as a row of vLLM's block table has room for.
            max_tokens=-(-self._config.model_config.max_model_len // tokens) * tokens,
            max_requests=self._max_requests,
            max_query_tokens=self.max_query_tokens,
            tables=tables,
            model=None if tables is None else model_of(self._config),
        )
        for number, one in zip(self._numbers, self._layers.values(), strict=True):
            assert isinstance(one.impl, ServedLayer)
            one.impl.bind(self.pool, number)
        self._pages = {}
        _metrics.publish(self.pool, self._config.parallel_config.rank)


def _first_kv_head(config: Any) -> int:
    """The number of this rank's first KV head, where each rank has its own ones."""
    from vllm.distributed import get_tensor_model_parallel_rank

    heads, ranks = config.model_config.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    return 0 if heads % ranks else get_tensor_model_parallel_rank() * heads // ranks


def _shape(layer: Any) -> tuple[Any, ...]:
    return (
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_size,
        layer.head_size_v,
        layer.kv_cache_torch_dtype,
        layer.impl.scale,
    )
