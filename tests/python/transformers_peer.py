"""A pytest plug-in for transformers' own generation tests: `generate` of every decoder goes through
vattn.transformers, policy dense. In a checkout of transformers' tests:

    PYTHONPATH=VATTN/api/python:VATTN/tests/python VATTN_PEER_LOG=log.jsonl \\
    python -m pytest -p transformers_peer -k "greedy or sample or beam or left_padding or continue or
    inputs_embeds or without_input_ids or logits_to_keep or position_ids or past_key_values_format" \\
    tests/models/llama/test_modeling_llama.py ...
    python VATTN/tests/python/transformers_peer.py log.jsonl ...    # the tables of TRANSFORMERS.md

A line of the log is a test, its outcome and why it failed; in later logs tests replace earlier ones.
"""

import collections
import functools
import json
import os
import sys
import threading

# Families with a test that ends in one of these are refused by `offload`. Reason by part of the text.
REFUSED = {
    "multi-head latent attention": "multi-head latent attention",
    "attention sinks": "attention sinks",
    "share the KV of others": "layers that share the KV of others",
    "a softcap": "a softcap",
    "no layer of plain full attention": "no layer of plain full attention",
    "does not attend through": "attention outside AttentionInterface",
    "cross attention": "cross attention",
    "attends to patches": "attention to patches of bytes",
    "attention by experts": "keys repeated by expert",
    "lightning attention": "lightning attention",
    "differential attention": "differential attention",
    "dynamic mask attention": "dynamic mask attention",
}
FAILED = {
    "cache_implementation is": "cache_implementation asked for: refused by name",
    "create_diffusion_decoder_attention_mask": "the tests are of another version of transformers",
}
# Tests that ask for attention weights: they run on the model's own attention, with a warning.
OWN = ("dict_output", "assisted_decoding")


def send_through_vattn():
    """Replaces `generate` of all models. Runs within another `generate` are the model's own."""
    import torch
    import vattn.transformers
    from transformers.generation.utils import GenerationMixin

    stock = GenerationMixin.generate
    running = threading.local()

    @functools.wraps(stock)
    def generate(self, *args, **kwargs):
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 2 and bool((mask[:, 1:] < mask[:, :-1]).any()):
            kwargs["attention_mask"] = torch.ones_like(mask)  # random, with holes: no real prompt
        if getattr(self.config, "is_encoder_decoder", False) or getattr(running, "on", False):
            return stock(self, *args, **kwargs)
        running.on = True
        try:
            wrapped = vattn.transformers.offload(
                self, policy="dense", sinks=0, window=1, exact_below=64, num_threads=1
            )
            return wrapped.generate(*args, **kwargs)  # not closed: tests go on with its cache
        finally:
            running.on = False

    GenerationMixin.generate = generate


def pytest_configure(config):
    send_through_vattn()


def pytest_runtest_logreport(report):
    path = os.environ.get("VATTN_PEER_LOG")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        lines = report.longreprtext.strip().splitlines() if report.outcome == "failed" else []
        reason = next((line for line in reversed(lines) if line.startswith("E ")), "")
        with open(path, "a") as log:
            log.write(json.dumps([report.nodeid, report.outcome, reason[:300]]) + "\n")


def reason_of(text, reasons, other):
    return next((name for part, name in reasons.items() if part in text), other)


def table(title, rows):
    lines = [f"| {title} | tests | families |", "|---|---:|---:|"]
    for name, tests in sorted(rows.items(), key=lambda row: -len(row[1])):
        lines.append(f"| {name} | {len(tests):,} | {len(set(tests)):,} |")
    return "\n".join(lines)


def main(paths):
    tests = {}
    for path in paths:
        for line in open(path):
            name, outcome, text = json.loads(line)[:3]
            tests[name] = (name.split("/")[2], outcome, text)
    refused = {
        family
        for family, outcome, text in tests.values()
        if outcome == "failed" and reason_of(text, REFUSED, None) is not None
    }
    taken, left, passed, own = (collections.defaultdict(list) for _ in range(4))
    for name, (family, outcome, text) in tests.items():
        if family in refused:
            if outcome == "failed":
                reason = reason_of(text, REFUSED, "the tests are of another version of transformers")
                left[reason].append(family)
        elif outcome == "failed":
            taken[reason_of(text, FAILED, "another reason")].append(family)
        elif outcome == "passed":
            passed["passed"].append(family)
            if any(part in name for part in OWN):
                own["own"].append(family)
    done, failed = len(passed["passed"]), sum(map(len, taken.values()))
    families = len({family for family, _, _ in tests.values()})
    print(
        f"Of {families} families, {families - len(refused)} are served: of their {done + failed:,} "
        f"tests that are not skipped, {done:,} pass. {len(own['own']):,} of these ask for attention "
        "weights and so run on the model's own attention.\n"
    )
    print(table("Served: why tests fail", taken), table("Refused: why", left), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
