"""Causal language models of the package transformers that decode from offloaded KV.

    wrapped = vattn.transformers.offload(model, policy="verified", epsilon=.1, delta=.05)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    ids = wrapped.generate(**inputs, max_new_tokens=100)
    for layer in wrapped.stats():
        print(layer.layer, layer.selected_share, layer.fetched_share, layer.verified_share)

The prompt runs through dense attention, layer by layer, and each layer's keys and values move to
vattn's host pool as soon as that layer is done. Every further token attends there. Works with
models whose attention goes through transformers' AttentionInterface (Llama, Qwen2, Mistral, ...),
on the CPU and on one CUDA device, with batches of prompts of different lengths, padded, and with
beams. Layers that are not plain full attention (sliding windows) stay with transformers. What is
not served is refused by its name: models by `offload`, calls before they change anything.
Inference only.

`save_tables` and `fingerprint` are for engines that keep KV of their own (`vattn.Runtime.paged`).
"""

from ._cache import VattnCache
from ._model import OffloadedModel, offload
from ._store import LayerStats
from ._tables import fingerprint, save_tables

__all__ = [
    "LayerStats",
    "OffloadedModel",
    "VattnCache",
    "fingerprint",
    "offload",
    "save_tables",
]
