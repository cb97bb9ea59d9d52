"""Tensor parallelism: two ranks on the CPU answer as one does."""

import json
import pathlib
import tempfile
import unittest

import real
from refusals_test import MODELS

RANKS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}


class Ranks(unittest.TestCase):
    def test_two_ranks_are_one(self):
        """Greedy tokens; that a rank's heads have the bits they have with all is in vllm_plan_test.py."""
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "config.json").write_text(json.dumps(MODELS["llama"]))
            engine = {
                "model": folder,
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "max_model_len": 1024,
                **real.ours(policy="dense"),
            }
            prompts = [[(7 * i * i + n) % 500 for i in range(300 + 50 * n)] for n in range(3)]
            call = [{"prompts": prompts, "tokens": 12}]
            one = real.run(call, **engine)
            two = real.run(
                call,
                environment=RANKS | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
                **engine,
                tensor_parallel_size=2,
            )
        self.assertNotIn("refused", one)
        self.assertNotIn("refused", two)
        self.assertEqual(
            [answer["ids"] for answer in one["calls"][0]], [answer["ids"] for answer in two["calls"][0]]
        )
        # Each rank has a pool with half of the heads, and both count.
        heads = "vattn_heads_exact_total"
        self.assertGreater(one["counters"][heads], 0)
        self.assertEqual(two["counters"][heads], one["counters"][heads])


if __name__ == "__main__":
    unittest.main()
