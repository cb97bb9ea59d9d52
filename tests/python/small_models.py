"""Small random language models, prompts for them, and the devices that are here."""

import torch
import vattn
import vattn.transformers
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)  # small matrices: threads would wait for each other most of the time

# A middle with tokens to choose from, although the prompts are short.
SMALL = {"sinks": 16, "window": 16, "exact_below": 64}
SHAPE = {
    "vocab_size": 89,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CUDA = [torch.device("cuda")] if torch.cuda.is_available() and vattn.devices() else []
DEVICES = [torch.device("cpu"), *CUDA]


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


def qwen2_with_sliding_layers():
    return Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, layer_types=MIXED, use_sliding_window=True, sliding_window=50)
    )


def make(model, device, dtype=torch.float32):
    torch.manual_seed(1)
    return model().to(device, dtype).eval()


def prompts(lengths, device, seed=2):
    """input_ids and attention_mask [len(lengths), longest], padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.stack(
        [pad(torch.randint(1, 89, (n,), generator=generator), (longest - n, 0)) for n in lengths]
    )
    mask = torch.stack([pad(torch.ones(n, dtype=torch.int64), (longest - n, 0)) for n in lengths])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def offload(case, model, **options):
    wrapped = vattn.transformers.offload(model, **SMALL | options)
    case.addCleanup(wrapped.close)
    return wrapped


GREEDY = {"do_sample": False, "max_new_tokens": 24}
