"""Tensor parallelism inside vLLM, on the CPU."""

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
    def test_two_ranks_answer_as_stock(self):
        """Greedy tokens beside vLLM's own attention on two ranks: weights that are made up are other ones on one.

        That a rank's heads have the bits that they have with all is in vllm_plan_test.py.
        """
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "config.json").write_text(json.dumps(MODELS["llama"]))
            engine = {
                "model": folder,
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "max_model_len": 1024,
                "tensor_parallel_size": 2,
            }
            prompts = [[(7 * i * i + n) % 500 for i in range(300 + 50 * n)] for n in range(3)]
            call = [{"prompts": prompts, "tokens": 12}]
            environment = RANKS | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
            stock = real.run(call, environment=environment, **engine)
            ours = real.run(call, environment=environment, **engine, **real.ours(policy="dense"))
        self.assertNotIn("refused", stock)
        self.assertNotIn("refused", ours)
        self.assertEqual(
            [answer["ids"] for answer in ours["calls"][0]],
            [answer["ids"] for answer in stock["calls"][0]],
        )
        self.assertGreater(ours["counters"]["vattn_heads_exact_total"], 0)


if __name__ == "__main__":
    unittest.main()
