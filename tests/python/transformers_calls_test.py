"""vattn.transformers on small models: counters and refusals."""

import unittest

import torch
import vattn
import vattn.transformers
from small_models import (
    DEVICES,
    GREEDY,
    SHAPE,
    llama,
    make,
    offload,
    prompts,
    qwen2_with_sliding_layers,
)
from transformers import MistralConfig, MistralForCausalLM


class Counters(unittest.TestCase):
    def test_they_add_up(self):
        for device in DEVICES:
            with self.subTest(device=device.type):
                model = make(qwen2_with_sliding_layers, device)
                wrapped = offload(self, model, epsilon=0.1)
                self.assertEqual((wrapped.stats(), wrapped.runtime_stats()), ([], None))
                wrapped.generate(**prompts((400, 300), device), **GREEDY)
                layers, runtime = wrapped.stats(), wrapped.runtime_stats()
                self.assertEqual([layer.layer for layer in layers], [0, 3])  # not the sliding ones
                for name in ("rows_middle", "rows_selected", "rows_fetched", "looks"):
                    self.assertEqual(
                        sum(getattr(layer, name) for layer in layers), getattr(runtime, name), name
                    )
                for name in ("exact", "verified", "dense", "best_effort"):
                    self.assertEqual(
                        sum(getattr(layer, name) for layer in layers),
                        getattr(runtime, f"heads_{name}"),
                    )
                steps = GREEDY["max_new_tokens"] - 1
                for layer in layers:
                    self.assertEqual(layer.steps, steps)
                    self.assertEqual(layer.exact + layer.verified + layer.dense, 2 * 4 * steps)
                    self.assertLess(layer.selected_share, 1)
                    self.assertLessEqual(layer.fetched_share, layer.selected_share)
                self.assertGreater(runtime.bytes_fetched, 0)
                wrapped.close()


class Refusals(unittest.TestCase):
    def refused(self, kind, text, call, *arguments, **named):
        with self.assertRaisesRegex(kind, text), torch.no_grad():
            call(*arguments, **named)

    def test_options(self):
        model = make(llama, DEVICES[0])
        self.refused(
            ValueError,
            "num_layers is 3, must be left out",
            vattn.transformers.offload,
            model,
            num_layers=3,
        )
        self.refused(
            vattn.InvalidArgumentError, "epsilom", vattn.transformers.offload, model, epsilom=0.1
        )
        sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=64))
        self.refused(
            ValueError, "no layer of plain full attention", vattn.transformers.offload, sliding
        )
        self.assertEqual(model.config._attn_implementation, "sdpa")

    def test_calls(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150, 60), DEVICES[0])
        wrapped = offload(self, model)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.refused(
            ValueError,
            "row 1 of the prompt has no token",
            wrapped,
            ids,
            mask * torch.tensor([[1], [0]]),
            past_key_values=wrapped.cache(),
        )
        whole = torch.ones(2, 1, 150, 150, dtype=torch.bool)
        self.refused(
            NotImplementedError,
            r"attention_mask is \[2, 1, 150, 150\], must be \[rows, tokens\]",
            wrapped,
            ids,
            whole,
            past_key_values=wrapped.cache(),
        )
        for device in DEVICES[1:]:  # others, and float16 and bfloat16, are read together
            there, row = offload(self, make(llama, device)), ids[:1].to(device)
            cache = there.cache()
            self.refused(
                NotImplementedError,
                "5 tokens at once after the prompt",
                lambda: [there(x, past_key_values=cache) for x in (row[:, -50:], row[:, -5:])],
            )
        with self.assertRaisesRegex(NotImplementedError, "torch.no_grad"):
            wrapped(ids, mask, past_key_values=wrapped.cache())

    def test_a_full_pool(self):
        wrapped = offload(self, make(llama, DEVICES[0]), host_bytes=1 << 20)
        self.refused(
            vattn.FullError,
            "host_bytes",
            wrapped.generate,
            **prompts((1500,), DEVICES[0]),
            **GREEDY,
        )

    def test_layers_are_in_host_memory_already(self):
        cache = offload(self, make(llama, DEVICES[0])).cache()
        cache.offload(0)
        cache.layers[0].prefetch()

    def test_keys_that_lose_their_layer(self):
        wrapped = offload(self, make(llama, DEVICES[0]))
        cache, rows = wrapped.cache(), torch.zeros(1, 2, 1, 32)
        cache.update(rows, rows, 0)
        self.refused(
            RuntimeError, "layer 0 has not attended through vattn", cache.update, rows, rows, 1
        )


if __name__ == "__main__":
    unittest.main()
