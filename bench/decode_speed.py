"""Decode speed of a language model by where its keys and values are: one prompt, one run.

    python bench/decode_speed.py --model FILE.gguf --device cuda --tokens 32768 --json speed.json
    python bench/decode_speed.py --shape qwen2.5-1.5b --device cuda --tokens 32768
    python bench/decode_speed.py --shape small --tokens 2048 --steps 8              # on the CPU

Compared: transformers with its own cache (dense attention, everything on the model's device), with
its offloaded cache (what `generate(cache_implementation="offloaded")` takes: whole layers, copied
to the device for every token), and vattn.transformers with its policies. All decode from the same
dense prefill and take turns, round by round; a round is --steps tokens. Printed are medians over
rounds.

Weights do not matter to the speed of dense attention. For verified they do: how many rows it reads
follows from the attention. A model with random weights attends evenly; the rows that this needs are
in the table (selected), and real models need fewer or more. Take --model for a figure to rely on.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys
import time
from typing import Any

try:
    import torch
    import transformers
    import vattn
    from quality import decode, models, policies, text
    from transformers import DynamicCache
    from vattn.transformers import VattnCache
except ImportError as missing:
    raise SystemExit(
        f"decode_speed: {missing}: pip install ./api/python torch transformers accelerate gguf"
    ) from missing

Row = dict[str, Any]
ON_DEVICE, OFFLOADED = "transformers, KV on the device", "transformers, offloaded cache"
WARM_UP = 3  # steps of each before the first round


def parse_arguments() -> argparse.Namespace:
    """Command line; see --help."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add(
        "--model", metavar="PACKAGE|FILE.gguf", help="an installed package with a .gguf file, or it"
    )
    add("--shape", choices=tuple(models.SHAPES), help="random weights of this shape instead")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(models.DTYPES), help="default: bfloat16 on cuda, float32 on cpu")
    add("--tokens", type=int, default=32768, help="of the prompt (default: %(default)s)")
    add("--steps", type=int, default=16, help="tokens of a round (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of every cache (default: %(default)s)")
    add(
        "--policies",
        default="verified .1,verified .2,dense",
        metavar="NAME,...",
        help="of vattn (default: %(default)s)",
    )
    add("--threads", type=int, default=0, help="on the CPU; 0: all (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the text (default: %(default)s)")
    add("--json", type=pathlib.Path, metavar="FILE")
    return p.parse_args()


def check(args: argparse.Namespace) -> list[str]:
    """The policies asked for; ValueError names what is wrong."""
    if bool(args.model) == bool(args.shape):
        raise ValueError("one of --model and --shape must be given")
    for name, least in (("tokens", 1024), ("steps", 1), ("rounds", 1), ("threads", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be {least} or more")
    asked = [name.strip() for name in args.policies.split(",")]
    ready = [name for name in policies.POLICIES if not name.startswith("topk")]
    for name in asked:
        if name not in ready:
            raise ValueError(f"--policies {name}: must be of {', '.join(ready)}")
    return asked


def prompt(model: models.Loaded, tokens: int, seed: int) -> list[int]:
    """Ids of source code; without a tokenizer random ones."""
    if model.tokenizer is None:
        words = model.model.config.vocab_size
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, words, (tokens,), generator=generator).tolist()
    ids: list[int] = []
    for passage in text.passages("source", seed):
        ids += model.tokenizer(passage, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            break
    return ids[:tokens]


def transformers_cache(row: decode.Row, offloading: bool) -> DynamicCache:
    """The row in transformers' own cache."""
    cache = DynamicCache(config=row.context.model.config, offloading=offloading)
    for i in range(len(cache.layers)):
        _, keys, values = row.layer(i)
        cache.update(keys[None], values[None], i)
    return cache


class Contestant:
    """A cache that takes its turns; vattn's attention is put in only for them."""

    def __init__(self, row: decode.Row, cache: Any, own: bool) -> None:
        """own: the cache is transformers'."""
        self._model = row.context.model
        self._cache = cache
        self._implementation = self._model.config._attn_implementation if own else "vattn"
        self._token = torch.tensor([[row.tail.next]], device=self._model.device)
        self._wait = torch.cuda.synchronize if self._model.device.type == "cuda" else lambda: None
        self.milliseconds: list[float] = []  # a token, by round

    @torch.no_grad()
    def run(self, steps: int) -> float:
        """Greedy tokens; milliseconds each."""
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(self._implementation)
        try:
            self._wait()
            begin = time.perf_counter()
            for _ in range(steps):
                logits = self._model(self._token, past_key_values=self._cache).logits
                self._token = logits[:, -1:].argmax(-1)
            self._wait()
            return 1000 * (time.perf_counter() - begin) / steps
        finally:
            self._model.set_attn_implementation(before)

    def stats(self) -> vattn.Stats | None:
        """Counters of vattn since the prompt; None for transformers' caches."""
        return self._cache.runtime_stats() if isinstance(self._cache, VattnCache) else None


def contestants(
    row: decode.Row, asked: list[str], args: argparse.Namespace
) -> dict[str, Contestant]:
    """By name, each with its cache filled."""
    model, room = row.context.model, WARM_UP + args.steps * args.rounds + 1
    found = {ON_DEVICE: Contestant(row, transformers_cache(row, False), own=True)}
    if args.device == "cuda":  # transformers' offloaded cache needs streams
        found[OFFLOADED] = Contestant(row, transformers_cache(row, True), own=True)
    for name in asked:
        options = policies.POLICIES[name] | {"num_threads": args.threads}
        cache = VattnCache(model.config.get_text_config(decoder=True), options, room)
        decode.fill(cache, [row])
        found[f"vattn, {name}"] = Contestant(row, cache, own=False)
    return found


def measure(found: dict[str, Contestant], steps: int, rounds: int) -> list[Row]:
    """Turns, and a row of the table for each."""
    for contestant in found.values():
        contestant.run(WARM_UP)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for contestant in found.values():
            contestant.milliseconds.append(contestant.run(steps))
    rows = []
    for name, contestant in found.items():
        middle = statistics.median(contestant.milliseconds)
        row: Row = {
            "name": name,
            "ms_a_token": round(middle, 3),
            "rounds_ms": [round(x, 3) for x in contestant.milliseconds],
            "tokens_a_second": round(1000 / middle, 2),
        }
        stats = contestant.stats()
        if stats is not None:
            read, tokens = policies.shares(stats), WARM_UP + steps * rounds
            row["selected"], row["fetched"] = round(read.selected, 5), round(read.fetched, 5)
            row["mb_moved_a_token"] = round(stats.bytes_fetched / 1e6 / tokens, 3)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| | ms a token | tokens/s | rows selected | fetched | MB moved a token |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        shares = [f"{row[k]:.2%}" if k in row else "" for k in ("selected", "fetched")]
        moved = f"{row['mb_moved_a_token']:.1f}" if "mb_moved_a_token" in row else ""
        cells = [row["name"], f"{row['ms_a_token']:.2f}", f"{row['tokens_a_second']:.1f}"]
        lines.append("| " + " | ".join([*cells, *shares, moved]) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    asked = check(args)
    device, dtype = models.place(args.device, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model:
        model = models.load(args.model, device, dtype)
    else:
        model = models.random_weights(args.shape, args.tokens + 4096, device, dtype)
    ids = prompt(model, args.tokens, args.seed)
    begin = time.perf_counter()
    context = decode.Context(model.model, ids[:-16])
    row = decode.Row(context, context.extend(ids[-16:]))
    print(
        f"{model.name}: {args.tokens} tokens read in {time.perf_counter() - begin:.1f} s",
        file=sys.stderr,
    )
    rows = measure(contestants(row, asked, args), args.steps, args.rounds)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{model.name}, {str(dtype).removeprefix('torch.')}, {args.tokens} tokens, {name}\n")
    print(table(rows))
    if args.json:
        result = {
            "schema_version": 1,
            "command": "python bench/decode_speed.py " + shlex.join(sys.argv[1:]),
            "model": model.name,
            "device": name,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": args.tokens,
            "versions": {
                "vattn": vattn.build_info(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, vattn.Error) as error:
        raise SystemExit(f"decode_speed: {error}") from None
