"""Greedy answers of a real model beside those of vLLM's own attention."""

import math
import unittest

import real

QUESTION = "\n\n# Question: what is the code above for?\n# Answer:"
LONG = [real.library_text(name, 3500) + QUESTION for name in ("queue.py", "textwrap.py")]
# 32 requests that begin alike.
SHARED = real.library_text("heapq.py", 1600)
MANY = [f"{SHARED}\n\n# {n}. Write a function named {word}.\ndef " for n, word in enumerate(
    [f"{verb}_{noun}" for verb in ("sort", "merge", "count", "find") for noun in (
        "names", "lines", "words", "files", "dates", "trees", "paths", "nodes")])]
CALLS = [
    {"prompts": LONG, "tokens": 20, "logprobs": 20},
    {"prompts": LONG[:1], "tokens": 8},  # again: its blocks are cached
    {"prompts": MANY, "tokens": 24},
]
# Fewer blocks than 32 requests come to need: some are preempted and computed again.
FEW_BLOCKS = {"num_gpu_blocks_override": 60, "max_model_len": 1536}


def tokens(answer, call):
    return [one["ids"] for one in answer["calls"][call]]


def divergence(want, got):
    """KL divergence of got's distribution from want's, in nats, the tokens that want lists apart."""
    total, rest_want, rest_got = 0.0, 1.0, 1.0
    for token, logprob in want.items():
        p = math.exp(logprob)
        q = math.exp(got.get(token, min(got.values())))
        total += p * (logprob - math.log(q))
        rest_want, rest_got = rest_want - p, rest_got - q
    if rest_want > 1e-6 and rest_got > 1e-6:
        total += rest_want * math.log(rest_want / rest_got)
    return total


class Answers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stock = real.run(CALLS, **FEW_BLOCKS)

    def compare(self, answer):
        """All tokens are the stock engine's, with prefixes shared and requests preempted on the way."""
        self.assertNotIn("refused", answer)
        for call in range(len(CALLS)):
            self.assertEqual(tokens(answer, call), tokens(self.stock, call))
        self.assertGreater(answer["calls"][1][0]["cached"], 600)
        self.assertGreater(answer["calls"][2][-1]["cached"], 300)
        self.assertGreater(answer["vllm"]["vllm:num_preemptions"], 0)
        self.assertEqual(answer["counters"]["vattn_requests_refused_total"], 0)
        self.assertGreater(answer["counters"]["vattn_prompt_tokens_total"], 0)

    def test_policy_dense_is_stock(self):
        self.compare(real.run(CALLS, **FEW_BLOCKS, **real.ours(policy="dense")))

    def test_policy_dense_with_rows_in_a_pool_of_ours(self):
        """The arrangement of CUDA: vLLM's pages have codes, or with policy dense nothing."""
        self.compare(real.run(CALLS, **FEW_BLOCKS, **real.ours(policy="dense", rows="pool")))

    def test_drafts_by_ngram_are_checked_exactly(self):
        draft = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
        answer = real.run(
            CALLS[:1], **FEW_BLOCKS, **real.ours(policy="dense"), speculative_config=draft
        )
        self.assertEqual(tokens(answer, 0), tokens(self.stock, 0))
        self.assertGreater(answer["vllm"]["vllm:spec_decode_num_accepted_tokens"], 0)
        steps = answer["counters"]["vattn_step_tokens_total"]
        self.assertGreater(steps, 2 * 19)  # query tokens, drafts included

    def test_policy_verified_agrees(self):
        """Distributions up to the first token that differs, and how far tokens are the same."""
        answer = real.run(CALLS, **FEW_BLOCKS, **real.ours(epsilon=0.1, exact_below=256))
        self.assertNotIn("refused", answer)
        same = total = 0
        divergences = []
        for want, got in zip(self.stock["calls"][0], answer["calls"][0]):
            for i, (a, b) in enumerate(zip(want["ids"], got["ids"])):
                divergences.append(divergence(want["logprobs"][i], got["logprobs"][i]))
                if a != b:
                    break
        for want, got in zip(tokens(self.stock, 2), tokens(answer, 2)):
            total += len(want)
            same += next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), len(want))
        kl, agreement = sum(divergences) / len(divergences), same / total
        counters = answer["counters"]
        share = counters["vattn_rows_selected_total"] / counters["vattn_rows_middle_total"]
        print(f"KL {kl:.5f} nats over {len(divergences)} tokens, {agreement:.1%} of tokens before the first "
              f"that differs, {share:.1%} of the middle read")  # fmt: skip
        self.assertLess(kl, 0.02)
        self.assertGreater(agreement, 0.8)
        self.assertLess(share, 0.8)
        self.assertGreater(counters["vattn_heads_verified_total"], 0)


if __name__ == "__main__":
    unittest.main()
