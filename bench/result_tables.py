"""Tables of the pages, made from the files in bench/results.

    python bench/result_tables.py            # writes them into README.md, bench/RESULTS.md, bench/PROMISE.md
    python bench/result_tables.py --check    # says which one is not as the files have it

A table stands between two lines, <!-- begin table NAME --> and <!-- end table NAME -->. NAME is a function below.
(The tables of bench/QUALITY.md come from bench/quality.py.)
"""

import json
import math
import pathlib
import re
import statistics
import sys
from typing import Any

TOP = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("README.md", "bench/RESULTS.md", "bench/PROMISE.md")
STEP_FILES = ("h100_step_b1", "h100_step_b16", "h100_step_b16_1m")
Row = dict[str, Any]


def result(name: str) -> Row:
    return json.loads((TOP / f"bench/results/{name}.json").read_text())


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    align = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, align, *rows])


def number(x: float, digits: int = 0) -> str:
    return f"{x:,.{digits}f}"


def percent(x: float, digits: int = 1) -> str:
    return f"{100 * x:.{digits}f} %"


def time_of(us: float) -> str:
    return f"{number(us)} us" if us < 10000 else f"{number(us / 1000)} ms"


def tokens(n: int) -> str:
    return f"{n // 1048576}M" if n >= 1048576 else f"{n // 1024}K"


def step_rows() -> list[Row]:
    rows = [row for name in STEP_FILES for row in result(name)["rows"]]
    return sorted(rows, key=lambda row: (row["batch"], row["tokens"]))


def commands(*names: str) -> str:
    lines = [result(name)["command"].rsplit(" --json", 1)[0] for name in names]
    return "```\n" + "\n".join(lines) + "\n```"


def step_commands() -> str:
    return commands(*STEP_FILES)


def step() -> str:
    head = ["tokens x batch", "verified, us", "dense with all KV in HBM, us", "dense streamed from the host, us",
            "HiSparse-style fetch and attention, no scoring, us", "rows selected / fetched a KV head"]
    rows = [[f"{tokens(row['tokens'])} x {row['batch']}", number(row["us"]["p50"]), number(row["dense_on_device"]["us"]),
             number(row["dense_streamed"]["us"]), number(row["hisparse_style"]["us"]),
             f"{number(row['selected_rows']['mean'])} / {number(row['fetched_rows']['mean'])}"] for row in step_rows()]
    return table(head, rows)


def stages() -> str:
    names = list(step_rows()[0]["stage_us"])
    rows = [[f"{tokens(row['tokens'])} x {row['batch']}", *(number(row["stage_us"][name]) for name in names),
             number(row["of_floor"], 1)] for row in step_rows()]
    return table(["tokens x batch", *names, "times what the bytes need"], rows)


H200_STEP_FILES = ("h200_step_b1", "h200_step_b1_wide", "h200_step_b16", "h200_step_resident")


def h200_step() -> str:
    flash = {(row["tokens"], row["batch"], row["kv_heads"]): row["us"] for row in result("h200_torch_flash")["rows"]}
    rows = []
    for name in H200_STEP_FILES:
        of = result(name)
        kv_heads = of["shape"]["kv_heads"]
        for row in of["rows"]:
            if name == "h200_step_resident" and not row["resident"]:
                continue
            dense = flash[row["tokens"], row["batch"], kv_heads]
            rows.append([f"{tokens(row['tokens'])} x {row['batch']}{', resident' if row['resident'] else ''}",
                         f"32 / {kv_heads}", number(row["us"]["p50"]), number(dense),
                         *(number(x) for x in row["stage_us"].values()), number(sum(row["stage_us"].values())),
                         f"{number(row['selected_rows']['mean'])} / {number(row['fetched_rows']['mean'])}"])
    names = list(result(H200_STEP_FILES[0])["rows"][0]["stage_us"])
    return table(["tokens x batch", "heads", "step, us", "torch flash, KV in HBM", *names, "sum",
                  "rows selected / fetched a KV head"], rows)


def h200_step_commands() -> str:
    return commands(*H200_STEP_FILES)


def decode_speed() -> str:
    rows = []
    for name in ("h100_decode_speed", "h100_decode_speed_random"):
        of = result(name)
        for row in of["rows"]:
            rows.append([of["model"], row["name"].replace(" .", " 0."), number(row["ms_a_token"], 1),
                         percent(row["selected"]) if "selected" in row else "-",
                         number(row["mb_moved_a_token"], 1) if "mb_moved_a_token" in row else "-"])
    return table(["model", "cache", "ms a token", "selected", "MB moved a token"], rows, left=2)


def decode_commands() -> str:
    return commands("h100_decode_speed", "h100_decode_speed_random")


def gather() -> str:
    of = result("h100_gather")
    shares = sorted({row["share"] for row in of["rows"]})
    kinds = [("memcpy", "contiguous"), ("bulk", "token"), ("team", "token"), ("warp per row", "random"), ("bulk", "random")]
    rows = []
    for mover, order in kinds:
        best = [max((row["gbps"]["p50"] for row in of["rows"]
                     if (row["mover"], row["order"], row["share"]) == (mover, order, share)), default=None)
                for share in shares]
        rows.append([f"{mover}, {order}", *(number(x, 1) if x is not None else "-" for x in best)])
    return table(["mover, order of rows", *(percent(share, 2) for share in shares)], rows)


def device_growth() -> str:
    of = result("h100_growth")
    rows = [[title, number(of[key]["calls"]), number(of[key]["grew"]), number(of[key]["growth_us"]["mean"], 2),
             number(of[key]["growth_us"]["p99"], 1), number(of[key]["growth_us"]["max"], 1)]
            for key, title in (("decode_from_empty", "steps of a growing sequence"),
                               ("appends", "appends of 16K tokens"), ("decode_between_appends", "steps between them"))]
    return table(["call", "calls", "that grew", "mean wait, us", "p99, us", "most, us"], rows)


def prefill() -> str:
    rows = []
    for name in ("h200_prefill_8k", "h200_prefill_64"):
        of = result(name)
        for row in of["rows"]:
            rows.append([number(of["tokens"]), tokens(row["stored"]) if row["stored"] else "0", number(1e3 * row["ours"], 1),
                         number(1e3 * row["torch"], 1), number(row["flop"] / row["ours"] / 1e12),
                         number(row["flop"] / row["torch"] / 1e12), number(row["bytes"] / row["ours"] / 1e9, 1)])
    return table(["new tokens", "stored", "ours, ms", "torch flash in HBM, ms", "TFLOP/s", "torch", "GB/s of stored rows"], rows)


def prefill_prompt() -> str:
    of = result("h200_prefill_1m")
    row = [tokens(of["prompt"]), number(of["tokens"]), number(of["seconds"], 1), number(of["flop"] / of["seconds"] / 1e12),
           number(of["flop"] / of["torch_flop_per_second"], 1), number(of["bytes"] / of["copy_bytes_per_second"], 1),
           number(1e3 * of["chunks"][-1], 0)]
    return table(["prompt", "tokens a chunk", "s", "TFLOP/s", "its FLOP at torch flash's speed, s",
                  "its rows at a copy's speed, s", "last chunk, ms"], [row])


def prefill_commands() -> str:
    return commands("h200_prefill_8k", "h200_prefill_64", "h200_prefill_1m")


SECOND_TURNS = ("h200_second_turn", "cpu_second_turn")


def second_turn() -> str:
    rows = []
    for name in SECOND_TURNS:
        of = result(name)
        rows.append([f"{of['model']}, {of['layers']} layers, {of['dtype']}, {of['device']}", number(of["tokens"]),
                     number(of["tokens"] / of["prompt_seconds"]), number(of["turn"]), number(of["call_seconds"], 2),
                     number(of["turn"] / of["call_seconds"]), number(of["token_by_token_seconds"], 2),
                     number(1 / of["step_seconds"], 1)])
    return table(["model", "prompt", "its tokens/s", "second turn", "in one call, s", "tokens/s", "token by token, s", "tokens/s"], rows)


def second_turn_commands() -> str:
    return commands(*SECOND_TURNS)


LLAMA_CPP = ("cpu_llama_cpp_4k", "cpu_llama_cpp_long")
LLAMA_CPP_QUALITY = ("cpu_llama_cpp_quality", "cpu_llama_cpp_4k")


def llama_cpp() -> str:
    rows = []
    alone: dict[tuple[int, int], float] = {}
    for of in [row for name in LLAMA_CPP for row in result(name)["rows"]]:
        case = (of["depth"], of["threads"])
        counted = of.get("counters", {})
        if of["way"] == "llama.cpp":
            alone[case] = of["cpu_seconds"]
        stretched = f", {number(of['stretched_from'])} again and again" if of["stretched_from"] else ""
        rows.append([f"{number(of['depth'])}{stretched}", of["way"], number(1000 * of["cpu_seconds"]), number(1 / of["cpu_seconds"], 2),
                     number(alone[case] / of["cpu_seconds"], 1), number(of["cpu_seconds_first"], 1), number(1000 * of["seconds_least"]),
                     percent(counted["rows_selected"] / counted["rows_middle"]) if counted.get("rows_middle") else ""])
    return table(["cells", "attention", "a token, ms", "tokens/s", "times llama.cpp's", "first token, s", "least on the clock, ms",
                  "rows read"], rows, 2)


def llama_cpp_quality() -> str:
    rows = []
    alone: dict[str, float] = {}
    for of in [row for name in LLAMA_CPP_QUALITY for row in result(name)["rows"]]:
        if of["way"] == "llama.cpp":
            alone[of["model"]] = of["loss"]
        counted = of.get("counters", {})
        rows.append([of["model"], number(of["depth"]), number(of["tokens"]), of["way"], number(math.exp(of["loss"]), 4),
                     percent(math.exp(of["loss"] - alone[of["model"]]) - 1, 2),
                     number(of["divergence"], 4) if "divergence" in of else "",
                     percent(of["same_first"]) if "same_first" in of else "",
                     percent(counted["rows_selected"] / counted["rows_middle"]) if counted.get("rows_middle") else ""])
    return table(["model", "cells", "tokens", "attention", "perplexity", "off", "KL, nats", "same first token", "rows read"], rows)


def llama_cpp_commands() -> str:
    return commands(*dict.fromkeys(LLAMA_CPP + LLAMA_CPP_QUALITY))


def paged() -> str:
    rows = [[f"{tokens(of['tokens'])} x {of['batch']}", number(of["block_tokens"]), number(of["own_us"]), number(of["pool_us"]),
             number(of["own_rows"]), number(of["pool_rows"])] for of in result("h200_paged")["rows"]]
    return table(["tokens x batch", "tokens of a block", "own sequences, us", "an engine's pool, us", "rows per KV head, own", "pool"],
                 rows)


def paged_commands() -> str:
    return commands("h200_paged")


TABLES_COST = ("cpu_tables_qwen_turns", "cpu_tables_qwen_answer", "cpu_tables_smol_turns")


def tables_cost() -> str:
    rows = []
    for name in TABLES_COST:
        of = result(name)
        row = [f"{of['model']}, {name.rsplit('_', 1)[1]}"]
        for which in ("own index", "tables of the text", "tables of the other text"):
            row.append(percent(of["rows"][which]["selected"], 2))
        other = of["rows"]["tables of the other text"]
        rows.append([*row, f"{other['off']} of {other['verified']}", percent(other["whole"] / other["heads"], 2)])
    return table(["recording", "rows, own index", "rows, tables of the same text", "rows, of the other text", "off", "whole"], rows)


def tables_cost_commands() -> str:
    return commands(*TABLES_COST)


SPECULATIVE = ("cpu_speculative_01", "cpu_speculative_03", "cpu_speculative_10")


def speculative() -> str:
    rows = []
    for name in SPECULATIVE:
        of = result(name)
        rows.append([number(of["epsilon"], 1), number(of["draft"]), percent(of["kept"] / of["drafted"], 0),
                     percent(of["rows_of_drafts"] / of["plain_rows"]), percent(of["rows_of_checks"] / of["plain_rows"]),
                     number(of["new_tokens"] / of["seconds"], 1), number(of["new_tokens"] / of["plain_seconds"], 1),
                     "yes" if of["same"] else "NO"])
    return table(["epsilon of drafts", "tokens a draft", "that stay", "rows read by drafts", "by checks", "tokens/s",
                  "plain, tokens/s", "same text"], rows)


def speculative_commands() -> str:
    return commands(*SPECULATIVE)


def follow() -> str:
    rows = []
    for name, title in (("early_2048", "of the first 2,048 tokens"), ("early_4096", "of the first 4,096 tokens"),
                        ("early_8192", "of the first 8,192 tokens")):
        kept = result(f"cpu_follow_code16_{name}")["all"]["kept"]
        rows.append([title, percent(kept["share"]), percent(kept["dense"] / kept["answers"])])
    once = result("cpu_follow_code16_early_2048")["all"]["kept_at_once"]
    rows.append(["of all tokens at once", percent(once["share"]), percent(once["dense"] / once["answers"])])
    return table(["index made", "rows selected", "heads read whole"], rows)


RECORDED = {"code16": "Qwen 16K code, layer 16", "qwen_chat20_l5kv1": "Qwen 20K conversation, layer 5, one KV head",
            "qwen_turns16k": "Qwen 16K turns, layers 5 11 16", "gemma_turns18k": "Gemma 3 18K turns, layers 5 11 17",
            "smol_turns7k": "SmolLM2 7K turns, layers 3 11 18 26"}


def ranks_coverage() -> str:
    of = result("cpu_ranks_coverage")["rows"]
    alone = {row["recording"]: row for row in of if row["ranks"] == 1}
    rows = []
    for row in of:
        one = alone[row["recording"]]
        rows.append([RECORDED[row["recording"]], str(row["ranks"]), number(row["answers"]), number(row["answers"] - row["verified"]),
                     number(row["wrong"]), f"{row['worst_head_bound']:.3f}".lstrip("0"), percent(row["rows"] / one["middle"], 2),
                     number(row["rows"] / one["rows"], 2), number(row["looks"], 2), number(row["bytes"])])
    return table(["recording", "ranks", "answers", "read whole", "VERIFIED and off", "highest bound", "rows of the middle",
                  "times those of one", "looks", "bytes of a gather"], rows)


def ranks_step() -> str:
    rows = []
    for name in ("h200x2_ranks_1", "h200x2_ranks_28", "h200_ranks_one_gpu"):
        for row in result(name)["results"]:
            one = name == "h200_ranks_one_gpu" and row["ranks"] > 1
            ranks = f"{row['ranks']} processes on 1" if one else str(row["ranks"])
            rows.append([tokens(row["tokens"]), str(row["layers"]), ranks, number(row["step_ms"], 2),
                         number(row["gathers_a_step"]), number(row["bytes_sent_a_step"] / 1024), percent(row["rows_share"], 2),
                         f"{number(row['heads_wrong'])} of {number(row['heads_verified'])}", number(row["heads_whole"])])
    return table(["tokens", "layers", "GPUs", "step, ms", "all-gathers", "KiB that a GPU sends", "rows of the context",
                  "VERIFIED and off", "read whole"], rows)


def ranks_commands() -> str:
    return commands("h200x2_ranks_1", "h200x2_ranks_28", "h200_ranks_one_gpu")


def kl(of: Row, policy: str) -> float:
    return 1000 * statistics.mean(x for text in of["texts"] for x in text["policies"][policy]["kl"])


def glance() -> str:
    replay, quality, speed = result("h100_replay_cpu"), result("quality_qwen05b_16k_agreement"), result("h100_decode_speed")
    layers = result("h100_step_layers")
    steps = {(row["tokens"], row["batch"]): row for row in step_rows()}
    ms = {row["name"]: row for row in speed["rows"]}

    def times(batch: int) -> str:
        parts = []
        for n in (131072, 1048576):
            row = steps[n, batch]
            parts.append(f"{tokens(n)} tokens {time_of(row['us']['p50'])} (dense {time_of(row['dense_on_device']['us'])})")
        return ", ".join(parts)

    ours, dense = ms["vattn, verified .1"], ms["vattn, dense"]
    rows = [
        ["Rows read: Qwen2.5-Coder-1.5B, 16K tokens of code, epsilon 0.1, delta 0.1",
         f"{percent(replay['selected_share']['mean'])} of the middle; {percent(replay['fetched_share']['mean'])} come from host "
         "memory, the others from a hot set of 5 %"],
        ["Device memory: 28 layers of 128K tokens, 8 KV heads of 128, bf16",
         f"{percent(layers['rows'][0]['device_bytes_of_kv'])} of the KV cache"],
        ["Time of one such layer on an H100, beside dense attention with all KV in HBM",
         f"one sequence: {times(1)}; 16 sequences: {times(16)}"],
        ["Time and traffic per token: Qwen2.5-Coder-0.5B in Python, 32K tokens", f"{number(ours['ms_a_token'], 1)} ms, "
         f"{number(ours['mb_moved_a_token'], 1)} MB from the host; reading all rows {number(dense['ms_a_token'], 1)} ms, "
         f"{number(dense['mb_moved_a_token'])} MB; transformers' offloaded cache "
         f"{number(ms['transformers, offloaded cache']['ms_a_token'], 1)} ms"],
        ["Quality: KL from dense attention in nats, Qwen2.5-Coder-0.5B, 16K tokens",
         f"{kl(quality, 'verified .1') / 1000:.4f}; top-k with as many rows {kl(quality, 'topk') / 1000:.4f}; "
         f"rounding alone {kl(quality, 'stock') / 1000:.4f}"],
    ]
    return table(["what", "measured"], rows, left=2) + "\n\n" + glance_sources()


def glance_sources() -> str:
    names = ("h100_replay_cpu", "h100_step_layers", *STEP_FILES, "h100_decode_speed", "quality_qwen05b_16k_agreement")
    builds = sorted({match[0] for name in names
                     for match in re.findall(r"commit ([0-9a-f]{7})()", json.dumps(result(name)))})
    return f"Measured at commit {' and '.join(builds)}."


def main() -> None:
    check, stale = "--check" in sys.argv[1:], []
    for page in PAGES:
        path = TOP / page
        text = path.read_text()

        def fill(found: re.Match[str]) -> str:
            return f"{found[1]}\n{globals()[found[2]]()}\n{found[4]}"

        made = re.sub(r"(<!-- begin table (\w+) -->)\n(.*?)\n?(<!-- end table \2 -->)", fill, text, flags=re.S)
        if made == text:
            continue
        if check:
            stale.append(page)
        else:
            path.write_text(made)
    if stale:
        raise SystemExit(f"tables are not those of bench/results, python bench/result_tables.py writes them: {', '.join(stale)}")


if __name__ == "__main__":
    main()
