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
    """The padding mask [rows, tokens] as it is, or None, if attention is causal; else as sdpa,
    [rows, 1, new tokens, tokens], with the padding mask as its attribute vattn_padding."""
    padding: torch.Tensor | None = kwargs.get("attention_mask")
    if kwargs.get("mask_function", causal_mask_function) is causal_mask_function:
        return padding
    whole: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    if whole is not None:
        whole.vattn_padding = padding  # type: ignore[attr-defined]
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
    if torch.is_autocast_enabled(query.device.type):  # sdpa takes its arguments so, too
        common = torch.get_autocast_dtype(query.device.type)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(common) for x in (query, key, value)
        )
    if dropout or (torch.is_grad_enabled() and query.requires_grad):
        raise NotImplementedError(
            "offloaded layers serve inference: use model.eval() and torch.no_grad()"
        )
    whole, padding = _taken_apart(attention_mask)
    rows, _, tokens, _ = query.shape
    if layer.index == layer.store.order[0]:
        if whole is not None and layer.tokens:
            _check_causal(whole, padding)
        layer.cache.begin(padding, rows, tokens, query.device)
    if layer.tokens == 0:
        if whole is None:
            out = _prompt(module, query, key, value, layer.store.chosen, scaling, kwargs)
        else:
            out = sdpa_attention_forward(
                module, query, key, value, whole, scaling=scaling, **kwargs
            )[0]
        layer.store.append(layer.index, query, key, value, scaling)
    else:
        scaled = layer.store.scaled(query, scaling)
        answer = layer.store.attend if tokens == 1 else layer.store.prefill
        out = answer(layer.index, scaled, key, value)
    layer.tokens += tokens
    layer.cache.done(layer.index, tokens)
    return out, None


def _taken_apart(
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(mask of pairs of tokens, or None if that is causal; padding mask [rows, tokens] or None)."""
    if attention_mask is None or attention_mask.ndim == 2:
        return None, attention_mask
    if not hasattr(attention_mask, "vattn_padding"):
        raise NotImplementedError(
            f"attention_mask is {list(attention_mask.shape)}, must be [rows, tokens] with 0 for "
            "padding, or left out"
        )
    return attention_mask, attention_mask.vattn_padding


def _check_causal(whole: torch.Tensor, padding: torch.Tensor | None) -> None:
    """Refuses the mask of new tokens that hides tokens before them which are no padding, or shows
    them later ones."""
    tokens, total = whole.shape[-2:]
    causal = torch.ones(tokens, total, dtype=torch.bool, device=whole.device).tril(total - tokens)
    right = whole.bool() == causal
    if padding is not None:  # neither what padding sees nor who sees it matters
        right = right | ~padding[:, None, None, :].bool() | ~padding[:, None, -tokens:, None].bool()
    if not bool(right.all()):
        raise NotImplementedError(
            "the model's mask hides tokens from a new one: a token after the prompt attends to "
            "all before it that are no padding"
        )


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
