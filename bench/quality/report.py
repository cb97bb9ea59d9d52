"""Tables in Markdown from the records of bench/quality.py."""

import math
from typing import Any

import numpy as np

from . import measure, policies, statistics, tasks

Result = dict[str, Any]
_CODES = 32  # bytes of index code a token and KV head, the library's default


def _number(estimate: statistics.Estimate, digits: int = 2, scale: float = 1) -> str:
    mean, low, high = (scale * x for x in (estimate.mean, estimate.low, estimate.high))
    if not math.isfinite(low):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _scores(documents: list[Result], policy: str, task: str | None) -> list[list[float]]:
    """Scores of a policy by document; task None: of every task."""
    return [
        [
            score
            for score, name in zip(document["policies"][policy]["scores"], document["tasks"])
            if task in (None, name)
        ]
        for document in documents
    ]


def task_tables(result: Result) -> str:
    """Scores by task, and their differences to dense attention, with 95 % intervals."""
    documents, names = result["documents"], result["policies"]
    present = [task for task in tasks.TASKS if any(task in d["tasks"] for d in documents)]
    scores, differences = [], []
    for task in [*present, None]:
        label = task or "all"
        base = _scores(documents, policies.BASELINE, task)
        samples = str(sum(len(group) for group in base))
        rows = {name: _scores(documents, name, task) for name in names}
        scores.append(
            [label, samples] + [_number(statistics.bootstrap(rows[name]), 0, 100) for name in names]
        )
        differences.append(
            [label, samples]
            + [
                _number(statistics.difference(rows[name], base), 1, 100)
                for name in names
                if name != policies.BASELINE
            ]
        )
    others = [name for name in names if name != policies.BASELINE]
    same = [[d["policies"][name]["same"] for d in documents] for name in others]
    differences.append(
        ["answers equal to dense", str(sum(map(len, same[0])))]
        + [_number(statistics.bootstrap(group), 0, 100) for group in same]
    )
    return "\n\n".join(
        [
            "Score in percent, 95 % interval:",
            _table(["task", "samples", *names], scores),
            "Score minus that of dense on the same prompts, in points:",
            _table(["task", "samples", *others], differences),
            _reads(documents, others, result, "documents"),
        ]
    )


def agreement_table(result: Result) -> str:
    """Agreement with dense attention along texts, with 95 % intervals."""
    texts, rows = result["texts"], []
    for name in [measure.STOCK, *result["policies"]]:
        if name == policies.BASELINE:
            continue
        found = [text["policies"][name] for text in texts]
        agree, kl, excess = (
            [[mean] for f in found for mean in f[key]] for key in ("agree", "kl", "excess")
        )
        ratio = statistics.bootstrap(excess)
        rows.append(
            [
                name,
                _number(statistics.bootstrap(agree), 1, 100),
                _number(statistics.bootstrap(kl), 3, 1000),
                _number(
                    statistics.Estimate(*map(math.exp, (ratio.mean, ratio.low, ratio.high))), 4
                ),
            ]
        )
    steps = measure.BLOCK * sum(len(f["agree"]) for f in found)
    base = math.exp(float(np.mean([text["nll"] for text in texts])))
    names = [name for name in result["policies"] if name != policies.BASELINE]
    return "\n\n".join(
        [
            f"{steps} tokens of {len(texts)} texts; perplexity of dense: {base:.3f}",
            _table(
                ["policy", "same most likely token, %", "KL, 1e-3 nats", "perplexity / dense"],
                rows,
            ),
            _reads(texts, names, result, "texts"),
        ]
    )


def _reads(records: list[Result], names: list[str], result: Result, kind: str) -> str:
    """What the policies read: rows, and with them bytes."""
    rows = []
    for name in names:
        options = result["options"][kind][name]
        found = [record["policies"][name] for record in records]
        selected, fetched, whole = (
            float(np.mean([f[key] for f in found])) for key in ("selected", "fetched", "whole")
        )
        bits = options.get("value_bits", 0)
        codes = (_CODES + result["head_dim"] * bits / 8) / result["row_bytes"]
        rows.append(
            [
                name,
                f"{selected:.2%}",
                f"{fetched:.2%}",
                f"{selected + codes:.2%}",
                f"{whole:.3%}" if name.startswith("verified") else "",
                ", ".join(
                    f"{key} {value:.4g}"
                    for key, value in options.items()
                    if key in ("topk_share", "base_share", "epsilon", "delta", "value_bits")
                ),
            ]
        )
    return _table(
        [
            "policy",
            "rows selected",
            "fetched past the hot set",
            "bytes read, codes included",
            "heads read whole",
            "options",
        ],
        rows,
    )


def tables(result: Result) -> str:
    """Everything that a result holds."""
    setting = (
        f"{result['model']}, {result['dtype']}, {result['device']}, prompts of {result['tokens']} "
        f"tokens, seed {result['seed']}"
    )
    parts = [f"### {setting}"]
    if result["documents"]:
        parts.append(task_tables(result))
    if result["texts"]:
        parts.append(agreement_table(result))
    return "\n\n".join(parts)
