"""examples/speculative.py: the text is that of plain greedy decoding, whatever a draft is worth."""

import argparse
import collections
import pathlib
import sys
import unittest

import numpy as np
from gguf import GGMLQuantizationType

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import gguf_config
import speculative

Tensor = collections.namedtuple("Tensor", "name data tensor_type")
Reader = collections.namedtuple("Reader", "tensors")
CONFIG = gguf_config.Config(
    arch="qwen2",
    name="small",
    layers=3,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    context=4096,
    rms_eps=1e-5,
    rope_base=10000.0,
    rope_factor=1.0,
)
WORDS = 97


def reader(sharpness):
    """Random weights; queries of larger sharpness tell more between tokens."""
    generator = np.random.default_rng(3)
    width, rows = CONFIG.width, CONFIG.kv_heads * CONFIG.head_dim
    shapes = {
        "attn_q": (width, width),
        "attn_k": (rows, width),
        "attn_v": (rows, width),
        "attn_output": (width, width),
        "ffn_gate": (96, width),
        "ffn_up": (96, width),
        "ffn_down": (width, 96),
    }
    arrays = {"token_embd.weight": generator.normal(size=(WORDS, width))}
    arrays["output.weight"] = generator.normal(size=(WORDS, width))
    arrays["output_norm.weight"] = np.ones(width)
    for layer in range(CONFIG.layers):
        for name, shape in shapes.items():
            scale = {"attn_q": sharpness, "attn_output": 4}.get(name, 1)
            arrays[f"blk.{layer}.{name}.weight"] = scale * generator.normal(
                0, shape[1] ** -0.5, shape
            )
        for name in ("attn_norm", "ffn_norm"):
            arrays[f"blk.{layer}.{name}.weight"] = np.ones(width)
    kind = GGMLQuantizationType.F32
    return Reader([Tensor(name, a.astype(np.float32), kind) for name, a in arrays.items()])


class Speculative(unittest.TestCase):
    def test_the_text_is_that_of_plain_decoding(self):
        prompt = np.random.default_rng(5).integers(0, WORDS, 1500).tolist()
        drafted = kept = selected = 0
        for sharpness, epsilon in ((2, 0.1), (3, 1.0), (3, 4.0)):
            for draft in (1, 4, 15):
                with self.subTest(sharpness=sharpness, epsilon=epsilon, draft=draft):
                    args = argparse.Namespace(max_new_tokens=30, draft=draft, epsilon=epsilon)
                    decoder = speculative.Decoder(reader(sharpness), CONFIG, prompt, args)
                    decoder.start()
                    now = decoder.speculate(30, draft)
                    text, read = decoder.ids, decoder.engine.rows
                    self.assertEqual(len(text), len(prompt) + 30)
                    decoder.start()
                    decoder.plain(30)
                    self.assertEqual(text, decoder.ids)
                    drafted, kept = drafted + now[0], kept + now[1]
                    selected += read[False]
        self.assertGreater(kept, 0)
        self.assertGreater(drafted, kept)  # some were wrong
        self.assertGreater(selected, 0)


if __name__ == "__main__":
    unittest.main()
