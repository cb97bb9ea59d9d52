"""Forward pass of a language model read from a GGUF file.

Covers the `llama`, `qwen2` and `gemma3` architectures. Needs numpy and gguf; PyTorch is an optional,
faster engine.

Shapes: n tokens in one call, m tokens in one chunk of it, heads = query heads, d = head
dimension, width = embedding length.
"""
import numpy as np
from gguf.quants import dequantize

# ---------------------------------------------------------------- engines

def visible_tokens(m, n, window):
    """[m, n] whether the last m of n tokens see each of them: those up to their own, of which `window`
    at most unless it is 0.
    """
    seen = np.tri(m, n, n - m, dtype=bool)
    return seen & ~np.tri(m, n, n - m - window, dtype=bool) if window else seen


def causal_attention(q, k, v, window=0):
    """Attention of the last m of n tokens.

    q [heads, m, d] unscaled, k and v [kv_heads, n, d] -> [heads, m, d].
    """
    heads, m, d = q.shape
    kv_heads, n, _ = k.shape
    grouped = (q * np.float32(d ** -0.5)).reshape(kv_heads, -1, d)     # rows: head of group, token
    unseen = np.where(visible_tokens(m, n, window), np.float32(0), np.float32(-np.inf))
    out = np.empty_like(grouped)
    for h in range(kv_heads):
        scores = grouped[h] @ k[h].T                                   # [group * m, n]
        scores.reshape(-1, m, n)[:] += unseen
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        np.divide(scores @ v[h], scores.sum(-1, keepdims=True), out=out[h])
    return out.reshape(heads, m, d)


class NumpyEngine:
    """Float32 BLAS."""
    name = "numpy"
    chunk = 256    # tokens per forward chunk: scores take group * chunk * n floats

    def weight(self, array):
        """Stored form of a weight [out, in]."""
        return array

    def linear(self, x, weight):
        """x [m, in] times weight [out, in] -> [m, out]."""
        return x @ weight.T

    def attend(self, q, k, v, window):
        """See causal_attention."""
        return causal_attention(q, k, v, window)


class TorchEngine:
    """Bfloat16 matrix products with float32 results; attention that never stores its scores."""
    name = "torch"
    chunk = 512

    def __init__(self):
        import torch
        self._torch = torch

    def _bf16(self, array):
        return self._torch.from_numpy(array).bfloat16()

    def weight(self, array):
        return self._bf16(array)

    def linear(self, x, weight):
        return self._torch.nn.functional.linear(self._bf16(x), weight).float().numpy()

    def attend(self, q, k, v, window):
        heads, m, d = q.shape
        kv_heads, n, _ = k.shape
        if m == 1:
            return causal_attention(q, k, v, window)     # reading k and v is the cost; no conversion
        group = heads // kv_heads
        # KV heads are the batch: one KV head then serves its group without a copy.
        shared = [self._bf16(x)[:, None].expand(kv_heads, group, n, d) for x in (k, v)]
        visible = self._torch.from_numpy(visible_tokens(m, n, window))
        out = self._torch.nn.functional.scaled_dot_product_attention(
            self._bf16(q).view(kv_heads, group, m, d), *shared, attn_mask=visible)
        return out.reshape(heads, m, d).float().numpy()


def make_engine(name):
    """Engine by name; auto takes torch where it can be imported."""
    if name == "numpy":
        return NumpyEngine()
    try:
        return TorchEngine()
    except ImportError:
        if name == "torch":
            raise ValueError("--engine torch: the package torch cannot be imported") from None
        return NumpyEngine()


# ---------------------------------------------------------------- forward pass

def rms_norm(x, weight, eps):
    """x [m, width] -> [m, width]."""
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def silu(x):
    """x * sigmoid(x)."""
    with np.errstate(over="ignore"):     # exp(-x) = inf gives the right limit, 0
        return x / (1 + np.exp(-x))


def gelu(x):
    """The tanh form of GELU."""
    return x / 2 * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x ** 3)))


def frequencies(base, dim):
    """Angles of RoPE a position [dim / 2]."""
    return base ** -(np.arange(0, dim, 2) / dim)


def half_split(rows, heads):
    """Undo the row order that GGUF gives `llama` query and key projections [heads * d, ...].

    GGUF stores the two coordinates of a rotation side by side; here they are d / 2 apart, for every
    architecture.
    """
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)


class Model:
    """Weights, KV cache for `capacity` tokens and the forward pass."""

    MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    # Of every layer, then those that some architectures have.
    NORMS = ("attn_norm", "ffn_norm")
    MORE_NORMS = ("attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm")
    EMBEDDING = "token_embd.weight"

    def __init__(self, reader, config, engine, capacity, depth, on_block=lambda: None):
        """Dequantises the weights of the first `depth` layers; `on_block` is called after each. Logits need
        all of them.
        """
        self.config, self.engine = config, engine
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._blocks = []
        for layer in range(depth):
            self._blocks.append(self._load_block(f"blk.{layer}."))
            on_block()
        self._output_norm = self._array("output_norm.weight")
        head = "output.weight" if "output.weight" in self._tensors else self.EMBEDDING
        self._head = engine.weight(self._array(head)) if depth == config.layers else None
        self._frequencies = frequencies(config.rope_base, config.head_dim) / config.rope_factor
        if "rope_freqs.weight" in self._tensors:
            self._frequencies /= self._array("rope_freqs.weight")
        self._local_frequencies = frequencies(config.local_rope_base, config.head_dim)
        gemma = config.arch == "gemma3"
        self._embedding_scale = np.float32(np.sqrt(config.width) if gemma else 1)
        self._activate = gelu if gemma else silu
        shape = (depth, config.kv_heads, capacity, config.head_dim)
        self.k = np.empty(shape, np.float32)     # post-RoPE
        self.v = np.empty(shape, np.float32)

    def forward(self, ids, first, on_queries=lambda *_: None, on_chunk=lambda: None):
        """Run ids [n] at positions first .. first + n - 1 and fill the KV cache.

        Returns the last layer's output [n, width]. `on_queries(layer, position, q)` sees every
        chunk's post-RoPE unscaled queries [heads, m, d].
        """
        rows = self._tensor(self.EMBEDDING)
        x = np.require(dequantize(rows.data[ids], rows.tensor_type), np.float32, "W")
        x *= self._embedding_scale
        for layer in range(len(self._blocks)):
            for low in range(0, len(ids), self.engine.chunk):
                part = slice(low, low + self.engine.chunk)
                x[part] = self._block(layer, x[part], first + low, on_queries)
                on_chunk()
        return x

    def chunks(self, n):
        """How often forward() calls on_chunk for n tokens."""
        return len(self._blocks) * -(-n // self.engine.chunk)

    def logits(self, hidden):
        """hidden [m, width] -> [m, vocabulary]."""
        normed = rms_norm(hidden, self._output_norm, self.config.rms_eps)
        return self.engine.linear(normed, self._head)

    def loss(self, hidden, targets):
        """Mean negative log-likelihood in nats of targets [m], given hidden [m, width]."""
        total = 0.0
        for low in range(0, len(targets), 64):
            logits = self.logits(hidden[low:low + 64])
            top = logits.max(-1)
            chosen = logits[np.arange(len(logits)), targets[low:low + 64]]
            total += float((np.log(np.exp(logits - top[:, None]).sum(-1)) + top - chosen).sum())
        return total / len(targets)

    def _tensor(self, name):
        if name not in self._tensors:
            raise ValueError(f"the GGUF file has no tensor {name}")
        return self._tensors[name]

    def _array(self, name):
        """One tensor as float32, [out, in] or [out]."""
        tensor = self._tensor(name)
        return np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, "W")

    def _load_block(self, prefix):
        """Norms as arrays; matrices as (engine weight [out, in], bias [out] or 0)."""
        block = {name: self._array(f"{prefix}{name}.weight")
                 for name in self.NORMS}
        block.update((name, self._array(f"{prefix}{name}.weight")) for name in self.MORE_NORMS
                     if f"{prefix}{name}.weight" in self._tensors)
        for name in self.MATRICES:
            weight, bias = self._array(f"{prefix}{name}.weight"), np.float32(0)
            if f"{prefix}{name}.bias" in self._tensors:
                bias = self._array(f"{prefix}{name}.bias")
            if self.config.arch == "llama" and name in ("attn_q", "attn_k"):
                heads = self.config.heads if name == "attn_q" else self.config.kv_heads
                weight = half_split(weight, heads)
                bias = half_split(bias, heads) if bias.ndim else bias
            block[name] = self.engine.weight(weight), bias
        return block

    def _block(self, layer, x, first, on_queries):
        """One layer on x [m, width] at positions first ..; returns the new x."""
        block, cfg = self._blocks[layer], self.config
        end = first + len(x)

        def linear(name, inputs):
            weight, bias = block[name]
            return self.engine.linear(inputs, weight) + bias

        def by_head(rows):     # [m, heads * d] -> [heads, m, d]
            return rows.reshape(len(rows), -1, cfg.head_dim).swapaxes(0, 1)

        def norm(name, inputs):     # as it is where the architecture has no such norm
            return rms_norm(inputs, block[name], cfg.rms_eps) if name in block else inputs

        local = cfg.is_local(layer)
        low = max(0, first + 1 - cfg.window) if local else 0     # the first token that any of x sees
        h = norm("attn_norm", x)
        q = self._rotate(norm("attn_q_norm", by_head(linear("attn_q", h))), first, local)
        self.k[layer, :, first:end] = self._rotate(
            norm("attn_k_norm", by_head(linear("attn_k", h))), first, local)
        self.v[layer, :, first:end] = by_head(linear("attn_v", h))
        on_queries(layer, first, q)
        mixed = self.engine.attend(q, self.k[layer, :, low:end], self.v[layer, :, low:end],
                                   cfg.window if local else 0)
        mixed = linear("attn_output", mixed.swapaxes(0, 1).reshape(len(x), -1))
        x = x + norm("post_attention_norm", mixed)
        h = norm("ffn_norm", x)
        h = linear("ffn_down", self._activate(linear("ffn_gate", h)) * linear("ffn_up", h))
        return x + norm("post_ffw_norm", h)

    def _rotate(self, x, first, local):
        """RoPE of x [heads, m, d] at positions first .., coordinates d / 2 apart."""
        turns = self._local_frequencies if local else self._frequencies
        angle = np.arange(first, first + x.shape[1])[:, None] * turns
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = np.split(x, 2, -1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
