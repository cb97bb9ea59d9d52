"""The classes that vLLM's registry leads to, by the configuration that it is starting with.

vLLM imports an attribute of this module by its name: CUSTOM is ours. CPU_ATTN, CPU_MLA and AMX_MLA
are what the CPU platform takes whatever was asked for; they are vLLM's own unless CUSTOM was.
"""

import importlib
from typing import Any

from ._register import refuse_version

_STOCK = {
    "CPU_ATTN": ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend"),
    "CPU_MLA": ("vllm.v1.attention.backends.mla.cpu_mla", "CPUMLABackend"),
    "AMX_MLA": ("vllm.v1.attention.backends.mla.amx_mla", "AMXMLABackend"),
}


def asked(config: Any) -> bool:
    """Whether a VllmConfig asks for backend CUSTOM, for all layers or for a kind of them."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = config.attention_config
    return AttentionBackendEnum.CUSTOM in (attention.backend, *attention.backend_per_kind.values())


def __getattr__(name: str) -> Any:
    if name == "CUSTOM":
        refuse_version()
        from ._backend import Backend

        return Backend
    if name not in _STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None or not asked(config):
        module, attribute = _STOCK[name]
        return getattr(importlib.import_module(module), attribute)
    refuse_version()
    if name != "CPU_ATTN":
        from ._served import refusal

        raise refusal("multi-head latent attention (MLA)")
    from ._cpu import CpuBackend

    return CpuBackend
