"""Decoding by llama.cpp alone, with vattn's dense attention and with policy verified, in turns, from the same states.

    llama_cpp_speed.py PROGRAM LIBRARY MODEL.gguf TEXT STATES CASE ... --threads 1 --rounds 3 --json OUT

PROGRAM is llama_cpp_decode, a CASE DEPTH or DEPTHxBASE (--stretch BASE). Of each way and depth the least and the median time
of a step over all rounds are kept, and the processor's time, which other programs hardly change: cpu_seconds, of the median step.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

WAYS = {"llama.cpp": None, "vattn dense": '{"policy": "dense"}', "vattn verified": "1"}


def machine() -> str:
    models = [line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    return f"{len(models)} x {models[0]}, shared with other programs"


def run(o: argparse.Namespace, depth: int, base: int, way: str, reference: str) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GGML_")}
    settings = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        stats = pathlib.Path(folder) / "stats.json"
        if settings is not None:
            environment |= {"GGML_VATTN": settings, "GGML_BACKEND_PATH": o.library, "GGML_VATTN_STATS": str(stats),
                            "GGML_VATTN_MIN_TOKENS": str(o.min_tokens)}
        command = [o.program, o.model, o.text, o.states, str(depth), "--tokens", str(o.tokens), "--threads", str(o.threads),
                   "--turn", str(o.turn), "--tokens-a-step", str(o.tokens_a_step)]
        command += ["--stretch", str(base)] if base else ["--reference", reference]
        row = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
        if stats.exists():
            counted = json.loads(stats.read_text().splitlines()[-1])
            row["counters"] = {name: counted[name] for name in
                               ("verified_calls", "dense_calls", "ggml_calls", "heads_verified", "heads_dense", "rows_selected",
                                "rows_middle", "verified_ns", "upkeep_ns", "dense_ns")}
        return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("program", "library", "model", "text", "states"):
        p.add_argument(name)
    p.add_argument("cases", nargs="+")
    p.add_argument("--tokens", type=int, default=48)
    p.add_argument("--tokens-a-step", type=int, default=1)
    p.add_argument("--turn", type=int, default=64)
    p.add_argument("--min-tokens", type=int, default=2048)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--name", default="", help="what the tables call the model")
    p.add_argument("--json", required=True, help="the last argument")
    o = p.parse_args()
    rows = []
    said = sys.argv[6:sys.argv.index("--json")]
    with tempfile.TemporaryDirectory() as folder:
        for case in o.cases:
            depth, _, base = case.partition("x")
            reference = str(pathlib.Path(folder) / f"{depth}.reference")
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(o.rounds):
                for way in WAYS:
                    runs[way].append(run(o, int(depth), int(base or 0), way, reference))
            for way, all_rounds in runs.items():
                # The last round has been compared with the first one's reference.
                row = dict(all_rounds[-1], model=o.name or pathlib.Path(o.model).stem, way=way, rounds=o.rounds)
                row["seconds_least"] = min(r["seconds_least"] for r in all_rounds)
                for name in ("seconds_median", "cpu_seconds", "cpu_seconds_first"):
                    row[name] = statistics.median(r[name] for r in all_rounds)
                rows.append(row)
                print(json.dumps(row), flush=True)
            of = {"command": "python bench/llama_cpp/llama_cpp_speed.py PROGRAM LIBRARY MODEL TEXT STATES " + " ".join(said),
                  "date": datetime.date.today().isoformat(), "machine": machine(), "rows": rows}
            pathlib.Path(o.json).write_text(json.dumps(of, indent=1) + "\n")


if __name__ == "__main__":
    main()
