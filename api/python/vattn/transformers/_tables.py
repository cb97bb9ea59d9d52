"""Tables of a model, from what its attention sees over a text."""

import threading
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._options import Path
from .._runtime import Runtime
from .._sequence import Sequence
from ..tables import config_fingerprint
from ._attention import NAME as OFFLOADED
from ._attention import Result
from ._attentions import _configs, _set
from ._served import endless_window, offloaded, refuse_unserved
from ._store import _BLOCK, _padded, _scale, _shape_options

_NAME = "vattn_record"
_here = threading.local()  # recorder: that of the thread's call


def fingerprint(model: PreTrainedModel) -> str:
    """The name under which `save_tables` saves a model's tables: `vattn.tables.fingerprint` of its
    shape, position encoding and key projections."""
    config = model.config.get_text_config(decoder=True)
    layers = _full(config)
    projections: dict[int, torch.Tensor] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        for name in ("k_proj", "qkv_proj", "query_key_value", "c_attn"):
            weight = getattr(getattr(module, name, None), "weight", None)
            if index is not None and weight is not None:
                projections.setdefault(index, weight)
    missing = [layer for layer, full in enumerate(layers) if full and layer not in projections]
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no key projection by a known name in layer {missing[0]}: "
            "give save_tables a name"
        )
    return config_fingerprint(
        config, layers, (projections[layer] for layer, full in enumerate(layers) if full)
    )


@torch.no_grad()
def save_tables(
    model: PreTrainedModel, ids: torch.Tensor, path: Path, name: str | None = None, **options: Any
) -> str:
    """Lets the model read a text, ids [1, tokens] without padding, and writes tables learnt from its
    keys, values and queries to a file, for `Runtime.paged` of an engine; returns the name they have.

    name: by default the model's `fingerprint`. options: those of the engine's runtime that tables
    depend on, as index_bytes. Of the tokens 1024 or more must be in the middle.
    """
    refuse_unserved(model)
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids is {list(ids.shape)}, must be [1, tokens]")
    if name is None:
        name = fingerprint(model)
    configs = _configs(model)
    before = [(config, config._attn_implementation) for config in configs]
    if any(now == OFFLOADED for _, now in before):
        raise ValueError("the model is offloaded: close the wrap first")
    recorder = _Recorder(model.config.get_text_config(decoder=True), ids.shape[1], options)
    try:
        model.set_attn_implementation(_NAME)
        _here.recorder = recorder
        model.base_model(ids.to(model.device), use_cache=False)
        recorder.save(path, name)
    finally:
        _here.recorder = None
        for config, now in before:
            if config._attn_implementation == _NAME:
                _set(config, now)
        recorder.close()
    return name


def _full(config: Any) -> list[bool]:
    """By layer: does it attend to all tokens."""
    layers = offloaded(config)
    return [True] * len(layers) if endless_window(config) else layers


class _Recorder:
    """A sequence with the rows and queries of a text."""

    def __init__(self, config: Any, tokens: int, options: dict[str, Any]) -> None:
        self.layers = _full(config)
        self._tokens, self._options = tokens, options
        self._runtime: Runtime | None = None
        self._sequence: Sequence | None = None
        self._scale = 1.0

    def add(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """query [1, q_heads, tokens, d], key and value alike, of a layer."""
        scale = _scale(query, scaling)
        if self._sequence is None:
            self._open(query, key, value, scale)
        assert self._sequence is not None
        if scale != self._scale:
            query = query * (scale / self._scale)
        q, k, v = (_padded(x[0].transpose(0, 1)).cpu() for x in (query, key, value))
        self._sequence.append(layer, k, v, q)

    def _open(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> None:
        own = _shape_options(self.layers, query, key, value, scale)
        dims = [own["head_dim_k"], own["head_dim_v"]]
        row = -(-sum(dims) * key.element_size() // 128) * 128 + dims[0] + 64  # with its code
        blocks = (-(-self._tokens // _BLOCK) + 2) * sum(self.layers) * key.shape[1]
        own |= {"backend": "cpu", "host_bytes": blocks * _BLOCK * row + (1 << 20)}
        self._runtime = Runtime(**own | self._options)
        self._sequence = self._runtime.sequence()
        self._scale = scale

    def save(self, path: Path, name: str) -> None:
        """Writes the tables."""
        if self._sequence is None:
            raise ValueError("the model attends by no layer that transformers' interface calls")
        self._sequence.save_tables(path, name)

    def close(self) -> None:
        """Frees the rows."""
        if self._runtime is not None:
            self._runtime.close()


def _record(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Result:
    """transformers' sdpa, whose rows and queries the thread's recorder takes."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if _here.recorder.layers[layer]:
        _here.recorder.add(layer, query, key, value, scaling)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )


AttentionInterface.register(_NAME, _record)
AttentionMaskInterface.register(_NAME, sdpa_mask)
