"""The attention function and the mask function that transformers calls under the name "vattn"."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ._cache import OffloadedLayer

NAME = "vattn"

Result = tuple[torch.Tensor, torch.Tensor | None]


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The padding mask [rows, tokens] as it is, or None, if attention is causal; else as sdpa."""
    if kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
        padding: torch.Tensor | None = kwargs.get("attention_mask")
        return padding
    whole: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return whole


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Result:
    """query [rows, q_heads, tokens, d], key and value [rows, kv_heads, tokens, d] ->
    ([rows, tokens, q_heads, d], None). Rows of an offloaded layer's cache come with their layer."""
    layer: OffloadedLayer | None = getattr(key, "vattn_layer", None)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name} is given: vattn serves plain softmax attention")
    if layer is None:
        whole = _causal(attention_mask, query.shape[2], key)
        return sdpa_attention_forward(module, query, key, value, whole, dropout, scaling, **kwargs)
    layer.store.pending = None
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise NotImplementedError(
            "offloaded layers serve inference: use model.eval() and torch.no_grad()"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            "offloaded layers need a 2D attention_mask [rows, tokens] and plain causal attention"
        )
    rows, _, tokens, _ = query.shape
    if layer.index == layer.store.order[0]:
        layer.cache.begin(attention_mask, rows, tokens, query.device)
    if layer.tokens == 0:
        out = _prompt(module, query, key, value, layer.store.prompt, scaling, kwargs)
        layer.store.append(layer.index, query, key, value, scaling)
    else:
        out = layer.store.attend(layer.index, query, key, value, scaling)
    layer.tokens += tokens
    layer.cache.done(layer.index, tokens)
    return out, None


def _prompt(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: list[slice | torch.Tensor],
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Dense causal attention, row by row where rows are padded: no mask, no work on padding."""
    rows, heads, tokens, _ = query.shape
    if all(isinstance(x, slice) and x.start == 0 for x in chosen):
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)[0]
    out = query.new_zeros(rows, tokens, heads, value.shape[3])
    for row, real in enumerate(chosen):
        q, k, v = (x[row : row + 1, :, real] for x in (query, key, value))
        out[row, real] = sdpa_attention_forward(module, q, k, v, None, scaling=scaling, **kwargs)[
            0
        ][0]
    return out


def _causal(padding: torch.Tensor | None, tokens: int, key: torch.Tensor) -> torch.Tensor | None:
    """The mask of a layer or cache that is not ours [rows, 1, tokens, kv tokens]; None: no need."""
    total = key.shape[2]
    if padding is not None and padding.ndim == 4:
        return padding
    if padding is None and tokens in (1, total):
        return None
    whole = torch.ones(tokens, total, dtype=torch.bool, device=key.device).tril(total - tokens)[
        None, None
    ]
    return whole if padding is None else whole & padding[:, None, None, :].bool()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
