"""Tokens per second of vLLM on the CPU, with its own attention and with vattn's, in one run.

    python bench/vllm_speed.py MODEL_FOLDER --tokens 8000 [--requests 1 8] [--json FILE]

Needs vLLM and the plug-in (api/python/VLLM.md), and MODEL_FOLDER/vattn.tables for policy verified. Both
engines are alive at a time and take turns, so that what else the machine does meets both. The requests
have a prefix of --tokens tokens in common, which each engine computes once; then they decode, each with
a line of its own. A decode step's time is that of --new tokens less that of one, over the rest. CPU time, of
all threads of the engine, is told beside the clock's: it says what a step costs where others use the cores.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import sysconfig
import time


def text_tokens(tokenizer, count):
    """The first `count` ids of modules of Python's standard library."""
    ids = []
    for name in ("typing", "argparse", "ast", "inspect", "tarfile", "doctest", "pydoc", "turtle", "subprocess"):
        text = pathlib.Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text()
        ids += tokenizer.encode(f"# File: {name}.py\n{text}\n")
        if len(ids) >= count:
            return ids[:count]
    raise ValueError(f"the text has {len(ids)} tokens, {count} are needed")


def serve(options):
    """The engine's process: reads how many requests, writes what their steps took."""
    from vllm import LLM, SamplingParams

    import vattn.vllm

    llm = LLM(**options["engine"])
    tokenizer = llm.get_tokenizer()
    prefix = text_tokens(tokenizer, options["tokens"])

    def generate(requests, new):
        prompts = [
            {"prompt_token_ids": prefix + tokenizer.encode(f"\n# {n}. What is in the files above?\n#")}
            for n in range(requests)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        begin, used = time.monotonic(), time.process_time()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return {
            "seconds": time.monotonic() - begin,
            "cpu": time.process_time() - used,
            "ids": [list(one.outputs[0].token_ids) for one in outputs],
        }

    for line in sys.stdin:
        asked = json.loads(line)
        answer = generate(asked["requests"], asked["new"])
        time.sleep(0.6)  # for the thread that writes counters
        print("ANSWER " + json.dumps(answer | {"counters": vattn.vllm.counters()}), flush=True)


class Engine:
    """A process with an engine in it."""

    def __init__(self, options, cores):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": str(options["gib"]),
                "VLLM_LOGGING_LEVEL": "WARNING",
                "OMP_NUM_THREADS": str(cores),
                # Threads of the engine that waits must not take cores from the other.
                "OMP_WAIT_POLICY": "passive",
                "HF_HUB_OFFLINE": "1",
            },
        )

    def ask(self, requests, new):
        print(json.dumps({"requests": requests, "new": new}), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the engine ended with {self._process.wait()}")

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def measure(args):
    longest = args.tokens + 64 + args.new
    engine = {
        "model": str(args.model),
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_model_len": -(-longest // 128) * 128,
        "max_num_batched_tokens": 2048,
        "block_size": 128,
    }
    kinds = {"stock": {}} | {
        name: {
            "attention_backend": "CUSTOM",
            "additional_config": {"vattn": {"policy": "dense"} if name == "dense" else {"epsilon": args.epsilon}},
        }
        for name in args.policies
    }
    engines = {
        name: Engine({"engine": engine | more, "tokens": args.tokens, "gib": args.gib}, args.cores)
        for name, more in kinds.items()
    }
    rows, filled = [], {}
    for name, one in engines.items():
        filled[name] = one.ask(1, 1)
        print(f"{name}: prefix of {args.tokens} tokens in {filled[name]['seconds']:.1f} s", file=sys.stderr, flush=True)
    for requests in args.requests:
        steps = {name: [] for name in kinds}
        for one in engines.values():
            one.ask(requests, 1)  # the requests' own lines
        for _ in range(args.rounds):
            last = {}
            for name, one in engines.items():
                before = one.ask(requests, 1)["counters"]
                short = one.ask(requests, 1)
                answer = one.ask(requests, args.new)
                steps[name].append([(answer[of] - short[of]) / (args.new - 1) for of in ("seconds", "cpu")])
                last[name] = answer, before
        for name in kinds:
            answer, before = last[name]
            step, cpu = (statistics.median(one) for one in zip(*steps[name]))
            row = {
                "engine": name,
                "tokens": args.tokens,
                "requests": requests,
                "step_ms": 1000 * step,
                "step_ms_all": [1000 * one for one, _ in steps[name]],
                "step_cpu_ms": 1000 * cpu,
                "tokens_per_second": requests / step,
                "prefix_seconds": filled[name]["seconds"],
                "prefix_cpu_seconds": filled[name]["cpu"],
                "same_tokens_as_stock": _same(last["stock"][0]["ids"], answer["ids"]),
            }
            if name != "stock":
                grown = {k: v - before.get(k, 0) for k, v in answer["counters"].items()}
                row["rows_read_share"] = grown["vattn_rows_selected_total"] / grown["vattn_rows_middle_total"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    for one in engines.values():
        one.close()
    return rows


def _same(want, got):
    """Share of tokens before the first that differs."""
    same = total = 0
    for a, b in zip(want, got):
        total += len(a)
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    return same / total


def _shown(arguments):
    """A command's arguments without the file that it writes, and folders by their last name."""
    at = arguments.index("--json")
    kept = arguments[:at] + arguments[at + 2 :]
    return [pathlib.Path(one).name if "/" in one else one for one in kept]


def main():
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=8000, help="of the common prefix")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--policies", nargs="+", default=["verified"], choices=["verified", "dense"])
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--new", type=int, default=17, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=int, default=1, help="KV cache of each engine")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    rows = measure(args)
    if args.json:
        import vattn

        args.json.write_text(
            json.dumps(
                {
                    "command": f"python bench/vllm_speed.py {' '.join(_shown(sys.argv[1:]))}",
                    "build": vattn.build_info(),
                    "date": datetime.date.today().isoformat(),
                    "machine": f"{platform.machine()}, {args.cores} cores",
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
