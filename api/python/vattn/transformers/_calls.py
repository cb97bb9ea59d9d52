"""What is looked at before every forward of an offloaded model, and refused or split there."""

import inspect
from typing import Any

import torch
from transformers import Cache

from ._attention import NAME
from ._cache import VattnCache

# Arguments of a forward with one entry a token, by the dimension that counts them.
_BY_TOKEN = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": -1,
    "token_type_ids": -1,
    "mm_token_type_ids": -1,
}
# How the arguments of a forward are called that hold images, films and sound.
_MEDIA = (
    "pixel_values",
    "image_",
    "video_",
    "input_features",
    "input_values",
    "audio_",
    "mm_encoder_outputs",
)

# Of these, what only says how large they are: tokens that were read before have them, too.
_SIZES = ("_grid_thw", "_sizes")


def cache_argument(function: Any) -> str:
    """The name that a forward has for its cache: transformers renamed it."""
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def without_adapters(model: Any) -> Any:
    """The model below the adapters that PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_model(cache: VattnCache, model: Any) -> None:
    """Refuses a cache of another model: its rows would be taken for this one's."""
    if cache.model is not None and cache.model() is not without_adapters(model):
        raise ValueError(
            f"cache holds rows of another model than this {type(model).__name__}, must be made by "
            "`cache` of a wrap of this one"
        )


def check_prompt(given: dict[str, Any]) -> None:
    """Refuses what is no batch of rows of tokens, and a mask that does not go with it."""
    for name, dims, shape in (
        ("input_ids", 2, "[rows, tokens]"),
        ("inputs_embeds", 3, "[rows, tokens, dimensions]"),
    ):
        rows = given.get(name)
        if rows is not None and not (isinstance(rows, torch.Tensor) and rows.ndim >= dims):
            raise TypeError(f"{name} is {_shown(rows)}, must be a Tensor {shape}")
    ids, embeds, mask = (given.get(x) for x in ("input_ids", "inputs_embeds", "attention_mask"))
    rows = ids if embeds is None else embeds
    if mask is None or isinstance(mask, dict):
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise TypeError(f"attention_mask is {_shown(mask)}, must be a Tensor [rows, tokens]")
    if rows is None or mask.ndim == 4:
        return
    if mask.shape[0] != rows.shape[0] or mask.shape[1] < rows.shape[1]:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, must be {list(rows.shape[:2])}, or more "
            "tokens where a cache holds what comes before"
        )


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a Tensor {list(value.shape)}"
    return f"a {type(value).__name__}"


def before_forward(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook. Tells the cache which tokens come, has what an interrupted call left
    behind undone, and on CUDA reads several tokens after the prompt one by one."""
    if module.config.get_text_config(decoder=True)._attn_implementation != NAME:
        return None
    given = kwargs
    if args:
        names = list(inspect.signature(module.forward).parameters)
        given = dict(zip(names, args)) | kwargs
    if given.get("output_attentions", getattr(module.config, "output_attentions", False)):
        raise ValueError(
            "output_attentions is True, must be left out: vattn has no attention weights to hand "
            "out (the wrapped model's `generate` runs such calls on the model's own attention)"
        )
    cache = given.get("cache")
    if cache is None:
        cache = given.get("past_key_values")
    if cache is None:
        return None
    if not isinstance(cache, VattnCache):
        if isinstance(cache, Cache):
            raise foreign_cache(cache)
        return None
    check_model(cache, module)
    cache.settle()
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    rows = ids if embeds is None else embeds
    if rows is None:
        return None
    tokens = rows.shape[1]
    if cache.get_seq_length() == 0:
        if not cache.last_logits_do:  # `generate` has seen the mask, and leaves out one of ones
            refuse_packed(given)
    elif tokens > 1 and not cache.store.reads_chunks():
        refuse_media(given)
        keep = given.get("logits_to_keep")
        if not cache.last_logits_do and (isinstance(keep, torch.Tensor) or keep != 1):
            raise NotImplementedError(
                f"{tokens} tokens at once after the prompt: of float32 rows, and of heads over 256, "
                "vattn reads one token a call on CUDA "
                "(logits_to_keep=1 reads them one by one and hands out the last one's logits)"
            )
        for i in range(tokens - 1):
            module(**_one(given, i, tokens))
        given = _one(given, tokens - 1, tokens)
        cache.expect(given["input_ids"] if embeds is None else None)
        return (), given
    cache.expect(ids if embeds is None else None)
    return None


def after_forward(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """A forward hook. What a model computed without attending to its cache is not handed out."""
    for cache in (*args, *kwargs.values()):
        if isinstance(cache, VattnCache):
            cache.check_done()


def foreign_cache(cache: Any) -> TypeError:
    """The error for a cache that is not ours."""
    return TypeError(
        f"cache is a {type(cache).__name__}, must be made by `cache` of the wrapped model, or left "
        "out: the model is offloaded, and decodes from vattn's caches alone until `close`"
    )


def refuse_media(given: dict[str, Any]) -> None:
    """Refuses images, sound and the like in a call whose tokens are read one by one."""
    for name in given:
        if name.endswith(_SIZES):
            continue
        if name.startswith(_MEDIA) and given[name] is not None:
            raise NotImplementedError(
                f"{name} are given after the prompt, must be in it: its tokens are read together, "
                "later ones one by one (`reset` the cache, and give all from the first token on)"
            )


def _one(given: dict[str, Any], i: int, tokens: int) -> dict[str, Any]:
    """The arguments of a forward with token i of `tokens` alone."""
    one = dict(given)
    for name, dim in _BY_TOKEN.items():
        value = one.get(name)
        if isinstance(value, torch.Tensor) and value.shape[dim] == tokens:
            one[name] = value.narrow(dim, i, 1)
    mask = one.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        one["attention_mask"] = mask[:, : mask.shape[1] - tokens + i + 1]
    return one


def refuse_packed(given: dict[str, Any]) -> None:
    """Refuses a prompt whose positions start again: sequences packed into one row. With a mask it
    is none: what the mask shows is read together, wherever the positions say it stands."""
    positions = given.get("position_ids")
    if not isinstance(positions, torch.Tensor) or given.get("attention_mask") is not None:
        return
    again = positions[:, 1:] <= positions[:, :-1] if positions.ndim == 2 else positions[:0]
    if bool(again.any()):
        first = int(again.any(0).nonzero()[0]) + 1
        raise ValueError(
            f"position_ids start again at token {first}: packed sequences are not served, give "
            "each a row of its own, padded on the left"
        )
