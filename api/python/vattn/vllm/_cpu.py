"""The backend of the CPU: ours for plain layers, and vLLM's own for others where it was asked so."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_spec_kind
from vllm.v1.kv_cache_interface import AttentionSpec

from ._backend import Impl, Metadata, layers_of, spec_of
from ._group import Group
from ._served import refusal


def _ours(sliding_window: int | None, attn_type: str) -> bool:
    """Whether CUSTOM was asked for layers of this kind; vLLM's CPU platform does not look."""
    attention = get_current_vllm_config().attention_config
    kind = get_attn_spec_kind(
        use_mla=False, has_sliding_window=sliding_window is not None, attn_type=attn_type
    )
    backend = attention.backend_per_kind.get(kind.value, attention.backend)
    return backend is AttentionBackendEnum.CUSTOM


class CpuBackend(CPUAttentionBackend):
    """In place of vLLM's CPU_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return _Layer  # type: ignore[return-value]

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CpuBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(32)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # ours are multiples of 16; vLLM's own kernels check theirs

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec_of(spec, on_cpu=True)


class _Layer:
    """Makes a layer's implementation: ours or vLLM's."""

    supports_pcp = False
    supports_dcp = False

    def __new__(  # type: ignore[misc]
        cls,
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
    ) -> Impl | CPUAttentionBackendImpl:
        kind = Impl if _ours(sliding_window, attn_type) else CPUAttentionBackendImpl
        return kind(
            num_heads,
            head_size,
            scale,
            num_kv_heads or num_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **extra,
        )


class CpuBuilder(CPUAttentionMetadataBuilder):
    """Metadata of a group of layers that are all ours, or all vLLM's."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        layers = layers_of(vllm_config, layer_names)
        ours = [name for name, layer in layers.items() if isinstance(layer.impl, Impl)]
        self.group: Group | None = None
        if not ours:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        if len(ours) < len(layers):
            other = next(name for name in layers if name not in ours)
            raise refusal(
                f"{ours[0]} in one KV cache group with {other}, which vLLM serves",
                "leave out --disable-hybrid-kv-cache-manager",
            )
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.group = Group(kv_cache_spec, layers, vllm_config, device)
        self.reorder_batch_threshold = self.group.max_query_tokens

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        if self.group is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return Metadata(self.group.plan(common_attn_metadata))
