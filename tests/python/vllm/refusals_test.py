"""What is not served is refused before the engine is ready, with the reason and what to do instead."""

import json
import pathlib
import tempfile
import unittest

import real

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
MODELS = {
    "llama": SMALL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": SMALL
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256},
    "gemma2": SMALL
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "layer_types": ["full_attention", "full_attention"],
    },
    "gemma3": SMALL
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 128,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 512,
        "torch_dtype": "float32",
    },
    "deepseek_v2": SMALL
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
    },
}
PER_KIND = {"attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}}


class Refusals(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        for name, config in MODELS.items():
            (cls.folder / name).mkdir()
            (cls.folder / name / "config.json").write_text(json.dumps(config))

    def start(self, model, calls=(), **engine):
        """An engine of a small model with random weights, by token ids."""
        given = {
            "model": str(self.folder / model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 1024,
            **(real.ours(policy="dense") if "attention_config" not in engine else {}),
        }
        return real.run(calls, **given | engine)

    def refused(self, text, model="llama", **engine):
        answer = self.start(model, **engine)
        self.assertIn("refused", answer)
        self.assertRegex(answer["refused"], text)

    def test_tables_are_missing(self):
        self.refused(r"python -m vattn\.tables \S*llama TEXT_FILES --out", **real.ours())
        self.refused("tables is /nowhere: no such file", **real.ours(tables="/nowhere"))

    def test_tables_of_another_model(self):
        self.refused("(?i)tables", **real.ours(tables=real.TABLES))

    def test_options(self):
        self.refused("no option 'epsilom', did you mean epsilon", **real.ours(epsilom=0.1))
        self.refused("epsilon is -1", **real.ours(policy="dense", epsilon=-1))

    def test_models(self):
        self.refused(r"sliding window \(of 256 tokens\): .*backend_per_kind", "mistral")
        self.refused(r"logits are capped \(softcap 50\)", "gemma2")
        self.refused("ALiBi", "bloom")
        self.refused(r"multi-head latent attention \(MLA\)", "deepseek_v2")

    def test_kv_in_fp8(self):
        self.refused("rows of fp8", kv_cache_dtype="fp8_e4m3")

    def test_layers_with_a_window_may_be_left_to_vllm(self):
        call = [{"prompts": [list(range(5, 505))], "tokens": 8}]
        options = {"additional_config": {"vattn": {"policy": "dense"}}} | PER_KIND
        mixed = self.start("gemma3", call, **options)
        self.assertNotIn("refused", mixed)
        stock = self.start("gemma3", call, attention_config={})
        self.assertEqual(mixed["calls"][0][0]["ids"], stock["calls"][0][0]["ids"])
        self.assertEqual(mixed["counters"]["vattn_steps_total"], 7)  # of one layer
        self.assertEqual(stock["counters"], {})


if __name__ == "__main__":
    unittest.main()
