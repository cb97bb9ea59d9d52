"""Tables for pools of an engine's own (`Runtime.paged`), learnt from a model's rows over a text.

    python -m vattn.tables MODEL TEXT --out FILE [--tokens N] [--index-bytes N] [--dtype TYPE]

MODEL is a folder of transformers' files or a .gguf file, TEXT a text as the model will read, the longer
the better: the model reads its first N tokens (by default 16384, or as many as it can), and what its
attention sees goes into FILE under the model's fingerprint. An engine that gives `fingerprint` of the
weights that it serves as `Runtime.paged(..., model=)` is refused another model's tables.
"""

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from ._arrays import Array
from ._errors import Error, invalid

_SAMPLES = 64  # elements of each matrix that count


def fingerprint(
    *,
    num_q_heads: int,
    layer_kv_heads: Iterable[int],
    head_dim_k: int,
    head_dim_v: int,
    rope: Mapping[str, Any],
    keys: Iterable[Array],
) -> str:
    """A model's name by what tables depend on; an engine computes it from the weights that it has.

    layer_kv_heads: KV heads by layer, 0 in layers without full attention. rope: what the position
    encoding is made of, by name, as transformers' config.rope_parameters has it. keys: the weight of
    the key projection of each layer with KV heads, [kv_heads * head_dim_k, width], of torch or numpy;
    64 of its elements, evenly spread, count, as bfloat16 has them.
    """
    heads = [int(count) for count in layer_kv_heads]
    shape = [int(num_q_heads), heads, int(head_dim_k), int(head_dim_v)]
    digest = hashlib.sha256(json.dumps([shape, _plain(rope)], sort_keys=True).encode())
    layers = 0
    for weight in keys:
        digest.update(_sampled(weight).tobytes())
        layers += 1
    if layers != sum(count > 0 for count in heads):
        raise invalid(f"keys has {layers} layers, must have those with KV heads: {heads}")
    most = max(heads, default=0)
    return (
        f"vattn-model-1 {len(heads)} layers {shape[0]}/{most} heads {head_dim_k}/{head_dim_v} "
        f"{digest.hexdigest()[:32]}"
    )


def config_fingerprint(config: Any, full: Sequence[bool], keys: Iterable[Array]) -> str:
    """The `fingerprint` of a model with such a text config of transformers.

    full: whether each layer has full attention. keys: as of `fingerprint`, of those layers.
    """
    q_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // q_heads
    return fingerprint(
        num_q_heads=q_heads,
        layer_kv_heads=[kv_heads * one for one in full],
        head_dim_k=dim,
        head_dim_v=dim,
        rope=getattr(config, "rope_parameters", None) or {},
        keys=keys,
    )


def _plain(value: Any) -> Any:
    """Numbers as floats, whatever a file wrote them as; None left out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | bool) else float(value)


def _sampled(weight: Array) -> Any:
    """Some elements as bits of bfloat16, rounded to nearest even."""
    flat = weight.reshape(-1)
    places = [i * (len(flat) - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)]
    if hasattr(flat, "detach"):
        flat = flat.detach()[places].float().cpu().numpy()
    else:
        flat = flat[places]
    bits = numpy.asarray(flat, numpy.float32).view(numpy.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return rounded.astype("<u2")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vattn.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=pathlib.Path, help="folder, or .gguf file")
    parser.add_argument("text", type=pathlib.Path, nargs="+", help="files, read one after the other")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file of tables to write")
    parser.add_argument("--tokens", type=int, default=16384, help="at most (default: %(default)s)")
    parser.add_argument(
        "--index-bytes", type=int, default=0, help="as the runtime's option (default: its default)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the model: float32, bfloat16, ... (default: its own)"
    )
    return parser.parse_args(arguments)


def _load(path: pathlib.Path, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    more: dict[str, Any] = {"dtype": dtype}
    folder = path
    if path.is_file():
        from transformers import GgufConfig

        folder = path.parent
        more["gguf_file"] = path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, **{**more, "dtype": None})
    if path.is_file():
        more["quantization_config"] = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **more)
    return model.eval(), tokenizer


def main(arguments: list[str]) -> None:
    """The command."""
    args = _parse(arguments)
    if args.tokens < 1:
        raise ValueError(f"--tokens is {args.tokens}, must be 1 or more")
    try:
        from .transformers import save_tables
    except ImportError as missing:
        raise ValueError(f"{missing}: pip install torch transformers") from missing
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in args.text)
    model, tokenizer = _load(args.model, args.dtype)
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = min(args.tokens, longest or args.tokens)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids
    name = save_tables(model, ids, args.out, index_bytes=args.index_bytes)
    print(f"{args.out}: tables of {ids.shape[1]} tokens, model {name}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, Error) as error:
        raise SystemExit(f"vattn.tables: {error}") from None
