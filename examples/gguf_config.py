"""Sizes and constants of a model, read from the metadata of a GGUF file."""
import dataclasses

try:
    import gguf
except ImportError as missing:
    raise SystemExit("the Python package gguf is missing: pip install numpy gguf") from missing

ARCHITECTURES = ("llama", "qwen2", "gemma3")


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
    # Gemma 3: all layers but every `global_every`-th see the last `window` tokens only, with angles of
    # their own. 0: every layer sees all.
    window: int = 0
    global_every: int = 6
    local_rope_base: float = 10000.0

    def is_local(self, layer):
        """Whether the layer sees a window of the context only."""
        return self.window > 0 and (layer + 1) % self.global_every != 0


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
        rope_factor=get("rope.scaling.factor", 1.0) if scaling == "linear" else 1.0,
        window=get("attention.sliding_window") if arch == "gemma3" else 0)
