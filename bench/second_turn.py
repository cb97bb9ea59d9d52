#!/usr/bin/env python3
"""Time of a second turn through vattn.transformers: in one call, and token by token.

    python bench/second_turn.py --model qwen.gguf --layers 4 --tokens 30000 --turn 500
    python bench/second_turn.py --shape qwen2.5-0.5b --device cuda --tokens 30000 --turn 500

A prompt of --tokens is read, then a turn of --turn tokens behind it: in one call, after it was taken
back token by token (the median of --steps calls, times the tokens of the turn). The model is the first
--layers layers of a GGUF file's, over source code, or of a shape with random weights, over random ids.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys
import time

try:
    import torch
    import transformers
    import vattn.transformers
    from quality import models, text
except ImportError as missing:
    raise SystemExit(
        f"second_turn: {missing}: pip install ./api/python torch transformers accelerate gguf"
    ) from missing

WARM_UP = 3  # single tokens before the first that is measured: one makes the index


def parse_arguments() -> argparse.Namespace:
    """Command line; see --help."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", metavar="PACKAGE|FILE.gguf", help="an installed package, or a file")
    add("--shape", choices=tuple(models.SHAPES), help="random weights of this shape instead")
    add("--layers", type=int, help="the first so many of the model's (default: all)")
    add("--tokens", type=int, default=30000, help="of the first prompt")
    add("--turn", type=int, default=500, help="tokens of the second turn")
    add("--steps", type=int, default=24, help="single tokens that are timed")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(models.DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--json", type=pathlib.Path, help="file for the results")
    args = p.parse_args()
    if bool(args.model) == bool(args.shape):
        p.error("one of --model and --shape must be given")
    return args


def prompt(model: models.Loaded, tokens: int) -> torch.Tensor:
    """Ids [1, tokens] of source code; without a tokenizer random ones."""
    if model.tokenizer is None:
        words = model.model.config.vocab_size
        return torch.randint(0, words, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids: list[int] = []
    for passage in text.passages("source", 1):
        ids += model.tokenizer(passage, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    return torch.tensor([ids[:tokens]])


def measure(args: argparse.Namespace, model: models.Loaded) -> dict[str, float]:
    """Seconds of the prompt and of the turn in both ways."""
    ids = prompt(model, args.tokens + args.turn).to(args.device)
    first, turn = ids[:, : args.tokens], ids[:, args.tokens :]
    with vattn.transformers.offload(model.model, num_threads=args.threads) as wrapped:
        cache = wrapped.cache(args.turn + 64)

        def seconds(some: torch.Tensor) -> tuple[float, torch.Tensor]:
            wait(args.device)
            begin = time.perf_counter()
            logits = wrapped(some, past_key_values=cache, logits_to_keep=1).logits
            wait(args.device)
            return time.perf_counter() - begin, logits.float()

        prompt_seconds, _ = seconds(first)
        called, whole = seconds(turn)
        cache.crop(args.tokens - cache.get_seq_length())
        singles = [seconds(turn[:, i : i + 1])[0] for i in range(WARM_UP + args.steps)]
        step = statistics.median(singles[WARM_UP:])
        cache.crop(args.tokens - cache.get_seq_length())
        again, other = seconds(turn)
    return {
        "prompt_seconds": prompt_seconds,
        "call_seconds": min(called, again),
        "step_seconds": step,
        "token_by_token_seconds": step * args.turn,
        "apart": float((whole - other).norm() / whole.norm()),
    }


def wait(device: str) -> None:
    """Until the device has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    device, dtype = models.place(args.device, args.dtype)
    torch.set_num_threads(args.threads)
    if args.model:
        model = models.load(args.model, device, dtype)
    else:
        model = models.random_weights(args.shape, args.tokens + 4096, device, dtype)
    layers = model.model.model.layers
    if args.layers:
        model.model.model.layers = layers = layers[: args.layers]
        model.model.config.num_hidden_layers = args.layers
        if getattr(model.model.config, "layer_types", None):
            model.model.config.layer_types = model.model.config.layer_types[: args.layers]
    of = measure(args, model)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(
        f"{model.name}, {len(layers)} layers, {name}: {args.tokens} tokens in "
        f"{of['prompt_seconds']:.2f} s ({args.tokens / of['prompt_seconds']:.0f} a second); "
        f"{args.turn} more in one call {of['call_seconds']:.3f} s "
        f"({args.turn / of['call_seconds']:.0f} a second), token by token "
        f"{of['token_by_token_seconds']:.2f} s ({1 / of['step_seconds']:.1f} a second)"
    )
    if args.json:
        result = {
            "command": "python bench/second_turn.py " + shlex.join(sys.argv[1:]),
            "model": model.name,
            "layers": len(layers),
            "device": name,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": args.threads,
            "versions": {
                "vattn": vattn.build_info(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "tokens": args.tokens,
            "turn": args.turn,
            **of,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, vattn.Error) as error:
        raise SystemExit(f"second_turn: {error}") from None
