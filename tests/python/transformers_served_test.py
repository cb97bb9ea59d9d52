"""vattn.transformers: which models are served, and by which name the others are refused."""

import unittest

import torch
import transformers
import vattn.transformers
from small_models import DEVICES, GREEDY, SHAPE, offload, prompts
from vattn.transformers._calls import refuse_media

CPU = DEVICES[0]
WIDE = SHAPE | {"num_hidden_layers": 3}
GPT2 = {
    "vocab_size": 89,
    "n_embd": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
IMAGE = 4  # the id of each of an image's tokens
KINDS = ["full_attention", "sliding_attention", "full_attention"]


def build(family, **config):
    torch.manual_seed(1)
    made = getattr(transformers, f"{family}Config")(**config)
    name = f"{family.removesuffix('Text')}ForCausalLM"
    kind = getattr(transformers, name, None) or getattr(transformers, f"{family}LMHeadModel")
    return kind(made).eval()


def with_images():
    """A model whose mask lets the tokens of an image see each other, before and after."""
    torch.manual_seed(1)
    text = WIDE | {"head_dim": 32, "sliding_window": 50, "layer_types": KINDS}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    made = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    model = transformers.Gemma3ForConditionalGeneration(made).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


class Served(unittest.TestCase):
    def compare(self, model):
        for lengths in ((150,), (150, 60)):
            inputs = prompts(lengths, CPU)
            want = model.generate(**inputs, **GREEDY).tolist()
            with offload(self, model, policy="dense") as wrapped:
                got = wrapped.generate(**inputs, **GREEDY).tolist()
            self.assertEqual(got, want)

    def test_a_scale_of_each_layer(self):
        for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            self.compare(build("GPT2", **GPT2, **{name: True}))
        self.compare(
            build("GPT2", **GPT2, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False)
        )
        self.compare(build("Granite", **WIDE, attention_multiplier=0.4))

    def test_head_dimensions_of_any_size(self):
        for dim in (8, 20, 34, 100):
            self.compare(build("Llama", **WIDE, head_dim=dim))

    def test_a_window_longer_than_the_context(self):
        for family in ("Phi3", "Mistral", "Starcoder2"):
            model = build(family, **WIDE, sliding_window=2048)
            self.compare(model)
            self.assertEqual(model.config.sliding_window, 2048)

    def test_images_that_see_themselves_whole(self):
        model = with_images()
        for lengths in ((150,), (150, 60)):
            inputs = prompts(lengths, CPU)
            inputs["input_ids"][inputs["input_ids"] == IMAGE] = 5  # in the text itself
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            for columns in (slice(-50, -46), slice(-8, -4)):
                inputs["input_ids"][:, columns] = IMAGE
                inputs["token_type_ids"][:, columns] = 1
            generator = torch.Generator().manual_seed(3)
            images = torch.randn(2 * len(lengths), 3, 16, 16, generator=generator)
            asked = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
            want = torch.stack(model.generate(**inputs, pixel_values=images, **asked).logits)
            causal = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
            causal = torch.stack(model.generate(**causal, pixel_values=images, **asked).logits)
            self.assertGreater((want - causal).abs().max(), 5e-3)  # the mask counts
            with offload(self, model, policy="dense") as wrapped:
                got = wrapped.generate(**inputs, pixel_values=images, **asked).logits
                torch.testing.assert_close(torch.stack(got), want, atol=5e-4, rtol=0)
                self.assertEqual([layer.layer for layer in wrapped.stats()], [0, 2])

                cache = wrapped.cache()
                told = wrapped.generate(**inputs, pixel_values=images, cache=cache, **GREEDY)
                more = {
                    "input_ids": torch.cat([told, inputs["input_ids"]], 1),
                    "attention_mask": torch.nn.functional.pad(
                        inputs["attention_mask"], (0, 174), value=1
                    ),
                }
                with self.assertRaisesRegex(NotImplementedError, "pixel_values are given after"):
                    wrapped.generate(**more, pixel_values=images, cache=cache, **GREEDY)

    def test_sizes_of_images_that_were_read(self):
        sizes = torch.ones(1, 3, dtype=torch.int64)
        refuse_media({"image_grid_thw": sizes, "video_grid_thw": sizes, "image_sizes": sizes})
        for name in ("pixel_values", "pixel_values_videos", "image_embeds", "input_features"):
            refuse_media({name: None})
            with self.assertRaisesRegex(NotImplementedError, f"{name} are given after the prompt"):
                refuse_media({"image_grid_thw": sizes, name: torch.ones(1, 3, 4, 4)})

    def test_masks_of_pairs_of_tokens(self):
        wrapped = offload(self, build("Llama", **WIDE), policy="dense")
        ids = prompts((150,), CPU)["input_ids"]
        cache = wrapped.cache()
        whole = torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
        new = torch.ones(1, 1, 1, 151, dtype=torch.bool)
        with torch.no_grad():
            with self.assertRaisesRegex(NotImplementedError, r"\[1, 1, 150, 150\], must be .rows"):
                wrapped(ids, attention_mask=whole, cache=cache)
            wrapped(ids, cache=cache)
            # As a model's own mask function would hand it on: a token after the prompt sees all.
            new.vattn_padding = None
            wrapped(ids[:, :1], attention_mask=new, cache=cache)
            new = torch.ones(1, 1, 1, 152, dtype=torch.bool)
            new[..., 7], new.vattn_padding = False, None
            with self.assertRaisesRegex(NotImplementedError, "hides tokens from a new one"):
                wrapped(ids[:, :1], attention_mask=new, cache=cache)
            self.assertEqual(cache.get_seq_length(), 151)

    def test_what_is_no_model_is_refused(self):
        model = build("Llama", **WIDE)
        for other, name in (
            (None, "NoneType"),
            ("meta-llama", "str"),
            (model.model, "LlamaModel"),
            (model.lm_head, "Linear"),
            (torch.compile(model), "OptimizedModule"),
        ):
            with self.assertRaisesRegex(TypeError, f"model is a {name}, must be a model of trans"):
                vattn.transformers.offload(other)

    def test_refused_by_name(self):
        latent = {
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
        }
        mixed = {"head_dim": 32, "sliding_window": 50, "layer_types": KINDS}
        shared = {
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": 89,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0, 0.0],
        }
        capped = mixed | {"attn_logit_softcapping": 2.0}
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        latent["first_k_dense_replace"] = 3
        for text, family, config in (
            (r"softcap \(attn_logit_softcapping is 2", "Gemma2", capped),
            ("attention sinks", "GptOss", mixed | experts),
            (r"latent attention \(kv_lora_rank is 32", "DeepseekV2", latent),
            (r"latent attention \(kv_lora_rank is 32", "DeepseekV3", latent),
            (r"share the KV of others \(num_kv_shared_layers is 1", "Gemma3nText", mixed | shared),
            ("differential attention", "DiffLlama", {}),
            (r"cross attention \(in layers \[1\]", "MllamaText", {"cross_attention_layers": [1]}),
            ("attention by experts", "JetMoe", {"kv_channels": 32, "num_local_experts": 2}),
            ("lightning attention", "MiniMax", {"head_dim": 32, "num_local_experts": 2}),
            ("no layer of plain full attention", "Mistral", {"sliding_window": 50}),
            ("does not attend through transformers' AttentionInterface", "Bloom", None),
        ):
            with self.subTest(family=family):
                sizes = WIDE if config is not None else {}
                if family == "MllamaText":
                    sizes = WIDE | {"bos_token_id": 1}
                if family.startswith("Deepseek"):
                    sizes = WIDE | {"num_key_value_heads": 4}
                if config is None:
                    config = {"vocab_size": 89, "hidden_size": 64, "n_layer": 2, "n_head": 2}
                model = build(family, **sizes | config)
                before = model.config._attn_implementation
                with self.assertRaisesRegex(ValueError, f"{type(model).__name__}.*{text}"):
                    vattn.transformers.offload(model)
                self.assertEqual(model.config._attn_implementation, before)
                self.assertNotIn("generate", vars(model))


if __name__ == "__main__":
    unittest.main()
