"""A language model read from a GGUF file: byte-level BPE tokenizer and forward pass.

Covers the `llama` and `qwen2` architectures. Needs numpy and gguf; PyTorch is an optional, faster
engine.

Shapes: n tokens in one call, m tokens in one chunk of it, heads = query heads, d = head
dimension, width = embedding length.
"""
import dataclasses
import re

import numpy as np

try:
    import gguf
    from gguf.quants import dequantize
except ImportError as missing:
    raise SystemExit("the Python package gguf is missing: pip install numpy gguf") from missing

ARCHITECTURES = ("llama", "qwen2")


# ---------------------------------------------------------------- metadata

@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of the model, all from GGUF metadata."""
    arch: str
    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int          # tokens
    rms_eps: float
    rope_base: float
    rope_factor: float    # linear position scaling: angles are divided by it


_REQUIRED = object()


def metadata(reader, key, default=_REQUIRED):
    """Value of one GGUF metadata key."""
    if key in reader.fields:
        return reader.fields[key].contents()
    if default is _REQUIRED:
        raise ValueError(f"the GGUF file has no metadata key {key}")
    return default


def open_model(path):
    """A gguf.GGUFReader of the file."""
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from None


def read_config(reader):
    """Config of an opened gguf.GGUFReader; ValueError names what this file does not cover."""
    arch = metadata(reader, "general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture {arch} is not supported "
                         f"(supported: {', '.join(ARCHITECTURES)})")

    def get(key, default=_REQUIRED):
        return metadata(reader, f"{arch}.{key}", default)

    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    for key, value, supported in (
            ("attention.value_length", get("attention.value_length", head_dim), head_dim),
            ("rope.dimension_count", get("rope.dimension_count", head_dim), head_dim),
            ("expert_count", get("expert_count", 0), 0)):
        if value != supported:
            raise ValueError(f"{arch}.{key} is {value}; only {supported} is supported")
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{arch}.rope.scaling.type is {scaling}; "
                         "only none and linear are supported")
    kind = gguf.LlamaFileType(metadata(reader, "general.file_type", 0)).name    # e.g. MOSTLY_Q4_1
    return Config(
        arch=arch, name=f"{metadata(reader, 'general.name', arch)} {kind.partition('_')[2]}",
        layers=get("block_count"), width=width, heads=heads,
        kv_heads=get("attention.head_count_kv", heads), head_dim=head_dim,
        context=get("context_length"), rms_eps=get("attention.layer_norm_rms_epsilon"),
        rope_base=get("rope.freq_base", 10000.0),
        rope_factor=get("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0)


# ---------------------------------------------------------------- tokenizer

# Word splitting. Python's re has no \p{L} and \p{N}: letters are written [^\W\d_] and digits \d.
# That differs from the original patterns only for characters such as superscript digits, fractions
# and combining marks.
_LETTER, _SYMBOL, _ENDING = r"[^\W\d_]", r"(?:[^\s\w]|_)", r"'(?:s|t|re|ve|m|ll|d)"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_ENDING}| ?{_LETTER}+| ?\d+| ?{_SYMBOL}+|{_SPACES}"
_SINGLE_DIGITS = rf"\d|{_ENDING}| ?{_LETTER}+| ?{_SYMBOL}+|\s+(?=\d)|{_SPACES}"


def _by_line(digits):
    """Words that keep line ends apart, with `digits` digits at most in a number."""
    return (rf"(?i:{_ENDING})|(?:[^\r\n\w]|_)?{_LETTER}+|\d{{1,{digits}}}"
            rf"| ?{_SYMBOL}+[\r\n]*|\s*[\r\n]+|{_SPACES}")


WORD_PATTERNS = {
    "default": _GPT2, "gpt-2": _GPT2, "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS,
    "qwen2": _by_line(1), "deepseek-r1-qwen": _by_line(1), "llama-bpe": _by_line(3)}


def byte_alphabet():
    """The printable character that byte-level BPE uses for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in chars:
            chars[byte] = chr(256 + len(chars) - len(plain))
    return chars


class Tokenizer:
    """Byte-level BPE from the vocabulary and merges in the GGUF metadata.

    Text is never read as control tokens; control_id gives theirs.
    """

    def __init__(self, reader):
        model = metadata(reader, "tokenizer.ggml.model")
        split = metadata(reader, "tokenizer.ggml.pre", "default")
        if model != "gpt2" or split not in WORD_PATTERNS:
            raise ValueError(f"tokenizer {model}/{split} is not supported "
                             f"(supported: gpt2 with {', '.join(WORD_PATTERNS)})")
        self.name = f"{model}/{split}"
        self.tokens = metadata(reader, "tokenizer.ggml.tokens")
        types = np.array(metadata(reader, "tokenizer.ggml.token_type"))
        self.control = types == gguf.TokenType.CONTROL     # [vocabulary]
        self.prefix = ([metadata(reader, "tokenizer.ggml.bos_token_id")]
                       if metadata(reader, "tokenizer.ggml.add_bos_token", False) else [])
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        merges = metadata(reader, "tokenizer.ggml.merges")
        self._ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        self._words = re.compile(WORD_PATTERNS[split])
        self._chars = byte_alphabet()
        self._bytes = {char: byte for byte, char in self._chars.items()}
        self._cache = {}

    def encode(self, text, limit=None):
        """Token ids of `text`, the first `limit` of them at most; adds no prefix."""
        ids = []
        for match in self._words.finditer(text):
            word = match.group()
            if word not in self._cache:
                self._cache[word] = self._encode_word(word)
            ids += self._cache[word]
            if limit is not None and len(ids) >= limit:
                return ids[:limit]
        return ids

    def control_id(self, name):
        """Token id of a control token."""
        if name not in self._ids or not self.control[self._ids[name]]:
            raise ValueError(f"the model's vocabulary has no control token {name}")
        return self._ids[name]

    def decode(self, ids):
        """Text of `ids`; control tokens appear by name."""
        data = b"".join(
            self.tokens[i].encode() if self.control[i]
            else bytes(self._bytes[char] for char in self.tokens[i]) for i in ids)
        return data.decode("utf-8", errors="replace")

    def _encode_word(self, word):
        """Merge the neighbouring pair of lowest rank until no pair has a rank."""
        parts = [self._chars[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                joined = i < len(pairs) and pairs[i] == best
                merged.append("".join(best) if joined else parts[i])
                i += 2 if joined else 1
            parts = merged
        return [self._ids[part] for part in parts]


# ---------------------------------------------------------------- engines

def causal_attention(q, k, v):
    """Attention of the last m of n tokens.

    q [heads, m, d] unscaled, k and v [kv_heads, n, d] -> [heads, m, d].
    """
    heads, m, d = q.shape
    kv_heads, n, _ = k.shape
    grouped = (q * np.float32(d ** -0.5)).reshape(kv_heads, -1, d)     # rows: head of group, token
    future = np.triu(np.full((m, m), -np.inf, np.float32), 1)
    out = np.empty_like(grouped)
    for h in range(kv_heads):
        scores = grouped[h] @ k[h].T                                   # [group * m, n]
        scores.reshape(-1, m, n)[:, :, n - m:] += future
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

    def attend(self, q, k, v):
        """See causal_attention."""
        return causal_attention(q, k, v)


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

    def attend(self, q, k, v):
        heads, m, d = q.shape
        kv_heads, n, _ = k.shape
        if m == 1:
            return causal_attention(q, k, v)     # reading k and v is the cost; no conversion
        group = heads // kv_heads
        # KV heads are the batch: one KV head then serves its group without a copy.
        shared = [self._bf16(x)[:, None].expand(kv_heads, group, n, d) for x in (k, v)]
        visible = self._torch.ones(m, n, dtype=self._torch.bool).tril(n - m)
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


def gated(gate, up):
    """SiLU(gate) * up, each [m, ffn]."""
    with np.errstate(over="ignore"):     # exp(-gate) = inf gives the right limit, 0
        return gate / (1 + np.exp(-gate)) * up


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
    EMBEDDING = "token_embd.weight"

    def __init__(self, reader, config, engine, capacity, on_block=lambda: None):
        """Dequantises every weight; `on_block` is called after each layer."""
        self.config, self.engine = config, engine
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._blocks = []
        for layer in range(config.layers):
            self._blocks.append(self._load_block(f"blk.{layer}."))
            on_block()
        self._output_norm = self._array("output_norm.weight")
        head = "output.weight" if "output.weight" in self._tensors else self.EMBEDDING
        self._head = engine.weight(self._array(head))
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        self._frequencies = config.rope_base ** -exponents / config.rope_factor     # [d / 2]
        if "rope_freqs.weight" in self._tensors:
            self._frequencies /= self._array("rope_freqs.weight")
        shape = (config.layers, config.kv_heads, capacity, config.head_dim)
        self.k = np.empty(shape, np.float32)     # post-RoPE
        self.v = np.empty(shape, np.float32)

    def forward(self, ids, first, on_queries=lambda *_: None, on_chunk=lambda: None):
        """Run ids [n] at positions first .. first + n - 1 and fill the KV cache.

        Returns the last layer's output [n, width]. `on_queries(layer, position, q)` sees every
        chunk's post-RoPE unscaled queries [heads, m, d].
        """
        rows = self._tensor(self.EMBEDDING)
        x = np.require(dequantize(rows.data[ids], rows.tensor_type), np.float32, "W")
        for layer in range(self.config.layers):
            for low in range(0, len(ids), self.engine.chunk):
                part = slice(low, low + self.engine.chunk)
                x[part] = self._block(layer, x[part], first + low, on_queries)
                on_chunk()
        return x

    def chunks(self, n):
        """How often forward() calls on_chunk for n tokens."""
        return self.config.layers * -(-n // self.engine.chunk)

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
                 for name in ("attn_norm", "ffn_norm")}
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

        h = rms_norm(x, block["attn_norm"], cfg.rms_eps)
        q = self._rotate(by_head(linear("attn_q", h)), first)
        self.k[layer, :, first:end] = self._rotate(by_head(linear("attn_k", h)), first)
        self.v[layer, :, first:end] = by_head(linear("attn_v", h))
        on_queries(layer, first, q)
        mixed = self.engine.attend(q, self.k[layer, :, :end], self.v[layer, :, :end])
        x = x + linear("attn_output", mixed.swapaxes(0, 1).reshape(len(x), -1))
        h = rms_norm(x, block["ffn_norm"], cfg.rms_eps)
        return x + linear("ffn_down", gated(linear("ffn_gate", h), linear("ffn_up", h)))

    def _rotate(self, x, first):
        """RoPE of x [heads, m, d] at positions first .., coordinates d / 2 apart."""
        angle = np.arange(first, first + x.shape[1])[:, None] * self._frequencies
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        a, b = np.split(x, 2, -1)
        return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
