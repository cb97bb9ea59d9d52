"""Tables learnt from a model for an engine's pool: they serve its rows, and no other model's."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

import torch
import vattn
import vattn.tables
import vattn.transformers
from small_models import SHAPE, SMALL, llama, make, prompts, qwen2_with_sliding_layers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CPU = torch.device("cpu")
TOKENS, BLOCK, HEADS, KV_HEADS, DIM = 1600, 16, 4, 2, 32


class Tables(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.file = self.folder / "tables"

    def runtime(self, layers, **options):
        runtime = vattn.Runtime(
            num_layers=len(layers),
            layer_kv_heads=layers,
            num_q_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim_k=DIM,
            head_dim_v=DIM,
            dtype="f32",
            backend="cpu",
            epsilon=0.1,
            **SMALL | options,
        )
        self.addCleanup(runtime.close)
        return runtime

    def paged(self, runtime, model=None):
        pool = [
            torch.zeros(2, 100, BLOCK, KV_HEADS, DIM) if heads else (None, None)
            for heads in runtime.options["layer_kv_heads"]
        ]
        paged = runtime.paged(
            [k for k, _ in pool],
            [v for _, v in pool],
            max_tokens=TOKENS,
            tables=self.file,
            model=model,
        )
        self.addCleanup(paged.close)
        return paged

    def test_they_serve_the_models_rows(self):
        model = make(llama, CPU)
        ids = prompts([TOKENS], CPU)["input_ids"]
        before = model.config._attn_implementation
        name = vattn.transformers.save_tables(model, ids, self.file)
        self.assertEqual(model.config._attn_implementation, before)
        self.assertEqual(name, vattn.transformers.fingerprint(model))
        runtime = self.runtime([KV_HEADS] * 4)
        paged = self.paged(runtime, name)
        other = prompts([TOKENS], CPU, seed=7)["input_ids"]
        with torch.no_grad():
            rows = model(other).past_key_values.layers
        slots = torch.randperm(100 * BLOCK // BLOCK)[:, None] * BLOCK + torch.arange(BLOCK)
        table = (slots[:, 0] // BLOCK).to(torch.int32)[None]
        paged.begin_step(
            table,
            torch.tensor([TOKENS], dtype=torch.int32),
            torch.tensor([0, 1], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            torch.ones(1, dtype=torch.int32),
        )
        for layer, held in enumerate(rows):
            k, v = held.keys[0].transpose(0, 1), held.values[0].transpose(0, 1)
            paged.write(layer, slots.flatten(), k, v)
            q = torch.randn(1, HEADS, DIM, generator=torch.Generator().manual_seed(layer))
            report = paged.report(layer, q)
            out = paged.attend(layer, q, report=report)
            exact = torch.nn.functional.scaled_dot_product_attention(
                q[0, :, None], *(x.transpose(0, 1).repeat_interleave(2, 0) for x in (k, v))
            )[:, 0]
            error = (out[0] - exact).norm(dim=1) / exact.norm(dim=1)
            self.assertLess(float(error.max()), 0.3)
            self.assertLess(int(report.verdict.max()), vattn.Verdict.BEST_EFFORT)
        self.assertGreater(runtime.stats().heads_verified, 0)

    def test_layers_with_a_window_are_left_out(self):
        model = make(qwen2_with_sliding_layers, CPU)
        ids = prompts([TOKENS], CPU)["input_ids"]
        vattn.transformers.save_tables(model, ids, self.file, "mine")
        self.paged(self.runtime([KV_HEADS, 0, 0, KV_HEADS]), "mine")
        with self.assertRaises(vattn.Error):
            self.paged(self.runtime([KV_HEADS] * 4))

    def test_a_fingerprint_is_a_models_own(self):
        model = make(llama, CPU)
        name = vattn.transformers.fingerprint(model)
        self.assertEqual(name, vattn.transformers.fingerprint(model.to(torch.bfloat16)))
        # As an engine computes it, whose projections lie in one matrix.
        fused = [
            torch.cat([layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight])
            for layer in model.model.layers
        ]
        own = {
            "num_q_heads": HEADS,
            "layer_kv_heads": [KV_HEADS] * 4,
            "head_dim_k": DIM,
            "head_dim_v": DIM,
            "rope": {"rope_type": "default", "rope_theta": 10000},
            "keys": [weight[HEADS * DIM :].float().detach().numpy() for weight in fused],
        }
        self.assertEqual(vattn.tables.fingerprint(**own), name)
        for changed in (
            {"rope": {"rope_type": "default", "rope_theta": 5e5}},
            {"num_q_heads": 8},
            {"keys": own["keys"][::-1]},
        ):
            self.assertNotEqual(vattn.tables.fingerprint(**own | changed), name)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "keys has 3 layers"):
            vattn.tables.fingerprint(**own | {"keys": own["keys"][1:]})
        torch.manual_seed(5)
        other = vattn.transformers.fingerprint(llama())
        self.assertNotEqual(other, name)
        vattn.transformers.save_tables(
            model.float(), prompts([TOKENS], CPU)["input_ids"], self.file
        )
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "model is vattn-model-1 4 layers"):
            self.paged(self.runtime([KV_HEADS] * 4), other)

    def test_wrong_arguments(self):
        model = make(llama, CPU)
        with self.assertRaisesRegex(ValueError, r"ids is \[2, 30\], must be \[1, tokens\]"):
            vattn.transformers.save_tables(model, torch.ones(2, 30, dtype=torch.int64), self.file)
        with self.assertRaises(vattn.InvalidArgumentError):  # too short a text
            vattn.transformers.save_tables(model, prompts([300], CPU)["input_ids"], self.file)
        self.assertEqual(model.config._attn_implementation, "sdpa")
        with vattn.transformers.offload(model), self.assertRaisesRegex(ValueError, "is offloaded"):
            vattn.transformers.save_tables(model, prompts([300], CPU)["input_ids"], self.file)
        self.assertFalse(self.file.exists())

    def command(self, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "vattn.tables", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def test_the_command(self):
        model, folder, text = make(llama, CPU), self.folder / "model", self.folder / "text"
        model.save_pretrained(folder)
        vocabulary = {chr(33 + token): token for token in range(SHAPE["vocab_size"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        ids = prompts([3000], CPU)["input_ids"][0]
        text.write_text("".join(chr(33 + token) for token in ids.tolist()))
        done = self.command(folder, text, "--out", self.file)
        self.assertEqual(done.returncode, 0, done.stderr)
        name = vattn.transformers.fingerprint(model)
        self.assertEqual(
            done.stdout, f"{self.file}: tables of 2048 tokens, model {name}\n", done.stderr
        )
        self.paged(self.runtime([KV_HEADS] * 4), name)
        for arguments, reason in (
            ((folder, text, "--out", self.file, "--tokens", "500"), "fewer|tokens"),
            ((folder / "none", text, "--out", self.file), "no such file or folder"),
            ((folder, text, "--out", self.file, "--tokens", "0"), "--tokens is 0"),
        ):
            done = self.command(*arguments)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, rf"vattn.tables: .*({reason})")


if __name__ == "__main__":
    unittest.main()
