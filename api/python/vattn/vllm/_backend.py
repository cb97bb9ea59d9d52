"""The backend of CUDA, by vLLM's hooks."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from ._group import Group
from ._layer import ServedLayer
from ._options import active
from ._pages import Page
from ._plan import Plan
from ._served import refuse_config, refuse_layer
from ._tables import tables_of


@dataclass
class Metadata(AttentionMetadata):
    """What layers are handed in a step."""

    plan: Plan


def spec_of(spec: AttentionSpec, on_cpu: bool) -> AttentionSpec:
    """A layer's spec, whose page has the contents of `Page`."""
    if not isinstance(spec, FullAttentionSpec) or spec.state_content_bytes is not None:
        return spec
    page = Page.of(
        active(),
        heads=spec.num_kv_heads,
        tokens=spec.block_size,
        head_dim_k=spec.head_size,
        head_dim_v=spec.head_size_v,
        dtype=spec.dtype,
        on_cpu=on_cpu,
    )
    return replace(spec, state_content_bytes=page.state_bytes)


def layers_of(config: VllmConfig, names: list[str]) -> dict[str, Any]:
    """vLLM's layers by name, in the order that they were made, which is that they run in."""
    return get_layers_from_vllm_config(config, Attention, names)


class Backend(AttentionBackend):
    """Attention from KV in host memory; vLLM's pages hold codes."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and head_size <= 256

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec_of(spec, on_cpu=False)


class Builder(AttentionMetadataBuilder[Metadata]):
    """Metadata of a group."""

    # A captured step serves requests of any number of query tokens up to the captured one.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.group = Group(kv_cache_spec, layers_of(vllm_config, layer_names), vllm_config, device)
        self.reorder_batch_threshold = self.group.max_query_tokens

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        return Metadata(self.group.plan(common_attn_metadata))


class Impl(ServedLayer, AttentionImpl[Metadata]):
    """A layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        refuse_layer(
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            extra=extra,
        )
        check_config(get_current_vllm_config())

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores and codes new rows."""
        self.write(key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Answers a step's queries in `output`."""
        if attn_metadata is None:
            return output.fill_(0)
        self.attend(query, output, attn_metadata.plan)
        return output


def check_config(config: VllmConfig) -> None:
    """Refuses what is known to be wrong before weights are loaded."""
    options = active()
    refuse_config(config, options.dense)
    tables_of(options, config)
