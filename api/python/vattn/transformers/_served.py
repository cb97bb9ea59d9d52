"""Which models are served. Everything else is refused by its name, before anything is changed."""

from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# Attention that is not one softmax over the keys that the cache was given, by config.model_type.
_ATTENTION = {
    "blt": "a decoder that attends to patches of bytes through a second cache",
    "diffllama": "differential attention, which attends twice with halves of the values",
    "doge": "dynamic mask attention, which adds to the logits",
    "jetmoe": "attention by experts, to keys that are repeated after the cache took them",
    "minimax": "lightning attention with a cache class of its own",
}


def refuse_unserved(model: Any) -> None:
    """Raises ValueError with the name of what a model has that vattn does not serve, TypeError for
    what is no model that generates."""
    name = type(model).__name__
    whole = getattr(model, "config", None)
    if not isinstance(whole, PreTrainedConfig) or not hasattr(type(model), "generate"):
        raise TypeError(
            f"model is a {name}, must be a model of transformers that generates, and itself (what "
            "torch.compile returns is not)"
        )
    config = whole.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model, must be a decoder alone")
    reason = _reason(model, config)
    if reason is not None:
        raise ValueError(f"{name} has {reason}: vattn serves plain softmax attention")
    if not any(offloaded(config)) and not endless_window(config):
        kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers})
        raise ValueError(
            f"{name} has no layer of plain full attention to offload: its cache layers are "
            f"{', '.join(kinds)}"
        )


def offloaded(config: Any) -> list[bool]:
    """By layer: does it attend to all tokens, so that its rows go to vattn."""
    return [type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers]


def endless_window(config: Any) -> bool:
    """Is there a sliding window that no context of the model reaches, in a config that gives the
    same one to all layers: then attention is full attention."""
    window = getattr(config, "sliding_window", None)
    longest = getattr(config, "max_position_embeddings", None)
    if getattr(config, "layer_types", None) is not None or window is None or longest is None:
        return False
    return bool(window >= longest)


def _reason(model: Any, config: Any) -> str | None:
    if getattr(config, "model_type", None) in _ATTENTION:
        return _ATTENTION[config.model_type]
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        return f"a softcap (attn_logit_softcapping is {cap})"
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        return f"multi-head latent attention (kv_lora_rank is {rank})"
    cross = getattr(config, "cross_attention_layers", None)
    if cross or getattr(config, "add_cross_attention", False):
        return f"cross attention (in layers {cross})" if cross else "cross attention"
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        return f"layers that share the KV of others (num_kv_shared_layers is {shared})"
    if any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in model.modules()):
        return "attention sinks (a parameter `sinks` in its attention)"
    return None
