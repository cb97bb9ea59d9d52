"""vattn.transformers on small random models: what it generates is what the stock model generates."""
import unittest

import torch
import vattn
import vattn.transformers
from torch.nn.functional import pad
from transformers import (DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM)

torch.set_num_threads(1)  # small matrices: threads would wait for each other most of the time

# A middle with tokens to choose from, although the prompts are short.
SMALL = {"sinks": 16, "window": 16, "exact_below": 64}
SHAPE = {"vocab_size": 89, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": .2,
         "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CUDA = [torch.device("cuda")] if torch.cuda.is_available() and vattn.devices() else []
DEVICES = [torch.device("cpu"), *CUDA]


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


def qwen2_with_sliding_layers():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, layer_types=MIXED, use_sliding_window=True, sliding_window=50))


def make(model, device, dtype=torch.float32):
    torch.manual_seed(1)
    return model().to(device, dtype).eval()


def prompts(lengths, device, seed=2):
    """input_ids and attention_mask [len(lengths), longest], padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.stack([pad(torch.randint(1, 89, (n,), generator=generator), (longest - n, 0)) for n in lengths])
    mask = torch.stack([pad(torch.ones(n, dtype=torch.int64), (longest - n, 0)) for n in lengths])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def offload(case, model, **options):
    wrapped = vattn.transformers.offload(model, **SMALL | options)
    case.addCleanup(wrapped.close)
    return wrapped


GREEDY = {"do_sample": False, "max_new_tokens": 24}


class SameTokens(unittest.TestCase):
    def compare(self, model, inputs, arguments, **options):
        """Generates with the stock model, then on vattn; returns the wrapped model."""
        want = model.generate(**inputs, **arguments)
        wrapped = offload(self, model, **options)
        got = wrapped.generate(**inputs, **arguments)
        self.assertEqual(got.tolist(), want.tolist())
        return wrapped

    def test_dense(self):
        for device in DEVICES:
            for model in (llama, qwen2, qwen2_with_sliding_layers):
                for lengths in ((300,), (300, 151, 40, 1)):
                    with self.subTest(device=device.type, model=model.__name__, lengths=lengths):
                        self.compare(make(model, device), prompts(lengths, device), GREEDY, policy="dense").close()

    def test_beams(self):
        for device in DEVICES:
            with self.subTest(device=device.type):
                self.compare(make(qwen2_with_sliding_layers, device), prompts((200, 90), device),
                             GREEDY | {"num_beams": 3}, policy="dense")

    def test_a_conversation(self):
        for device in DEVICES:
            for lengths in ((200,), (200, 120)):
                with self.subTest(device=device.type, lengths=lengths):
                    model, inputs = make(llama, device), prompts(lengths, device)
                    more = prompts((30,) * len(lengths), device, seed=3)["input_ids"]
                    answers = []
                    for wrapped in (None, offload(self, model, policy="dense")):
                        if wrapped is None:  # stock
                            generate, cache = model.generate, DynamicCache(config=model.config)
                            model.set_attn_implementation("sdpa")
                        else:
                            generate, cache = wrapped.generate, wrapped.cache(200)
                            model.set_attn_implementation("vattn")
                        first = generate(**inputs, **GREEDY, past_key_values=cache)
                        ids = torch.cat([first, more], 1)
                        mask = pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
                        answers.append(generate(input_ids=ids, attention_mask=mask, **GREEDY, past_key_values=cache))
                    self.assertEqual(answers[1].tolist(), answers[0].tolist())
                    self.assertEqual(cache.get_seq_length(), 200 + 24 + 30 + 23)


class Forward(unittest.TestCase):
    """The model's own calls with a cache of ours."""

    @torch.no_grad()
    def logits(self, wrapped, inputs, cache, steps, start):
        """Logits of `steps` fixed tokens, one a call [rows, steps, vocabulary]."""
        mask, out = inputs["attention_mask"], []
        for i in range(steps):
            mask = pad(mask, (0, 1), value=1)
            ids = torch.full((len(mask), 1), 5 + start + i, device=mask.device)
            out.append(wrapped(ids, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1,
                               past_key_values=cache).logits)
        return torch.cat(out, 1)

    def test_verified_is_close(self):
        for device in DEVICES:
            for model in (llama, qwen2):
                with self.subTest(device=device.type, model=model.__name__), torch.no_grad():
                    model, inputs = make(model, device), prompts((400, 250), device)
                    out = []
                    for options in ({"policy": "dense"}, {"policy": "verified", "epsilon": .02, "delta": .05}):
                        wrapped = offload(self, model, **options)
                        cache = wrapped.cache()
                        wrapped(**inputs, past_key_values=cache)
                        out.append(self.logits(wrapped, inputs, cache, 8, 0))
                    self.assertTrue(all(layer.verified_share == 1 and layer.looks > 0 for layer in wrapped.stats()))
                    self.assertLess((out[1] - out[0]).norm(), .1 * out[0].norm())
                    self.assertFalse(torch.equal(*out))

    def test_half_types_are_close(self):
        for device in DEVICES:
            for dtype in (torch.bfloat16, torch.float16):
                with self.subTest(device=device.type, dtype=dtype), torch.no_grad():
                    model, inputs = make(llama, device, dtype), prompts((300,), device)
                    want = self.logits(model, inputs, model(**inputs).past_key_values, 8, 0)
                    wrapped = offload(self, model, policy="dense")
                    cache = wrapped.cache()
                    wrapped(**inputs, past_key_values=cache)
                    got = self.logits(wrapped, inputs, cache, 8, 0)
                    self.assertLess((got - want).abs().max(), .03 * want.abs().max())
                    wrapped.close()

    def test_cropped_and_reordered(self):
        for device in DEVICES:
            with self.subTest(device=device.type), torch.no_grad():
                model, inputs = make(llama, device), prompts((200, 100), device)
                wrapped = offload(self, model, policy="dense")
                caches = [wrapped.cache(), DynamicCache(config=model.config)]
                out = []
                for cache in caches:  # the second takes the dense way through the attention function
                    wrapped(**inputs, past_key_values=cache)
                    self.logits(wrapped, inputs, cache, 5, 0)
                    cache.crop(-3)
                    cache.reorder_cache(torch.tensor([1, 1], device=device))
                    cache.batch_repeat_interleave(2)
                    cache.batch_select_indices(torch.tensor([0, 3], device=device))
                    mask = pad(inputs["attention_mask"][[1, 1]], (0, 2), value=1)
                    out.append(self.logits(wrapped, {"attention_mask": mask}, cache, 4, 50))
                    self.assertEqual(cache.get_seq_length(), 206)
                torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)
                wrapped.close()

    def test_reset_starts_anew(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150,), DEVICES[0])
        wrapped = offload(self, model)
        cache, out = wrapped.cache(), []
        for _ in range(2):
            with torch.no_grad():
                wrapped(**inputs, past_key_values=cache)
            out.append(self.logits(wrapped, inputs, cache, 3, 0))
            cache.reset()
        torch.testing.assert_close(*out, rtol=0, atol=0)
        self.assertEqual((cache.get_seq_length(), cache.stats(), cache.runtime_stats()), (0, [], None))

    def test_a_closed_model_is_the_stock_model(self):
        model, inputs = make(llama, DEVICES[0]), prompts((100,), DEVICES[0])
        with vattn.transformers.offload(model) as wrapped:
            wrapped.generate(**inputs, **GREEDY)
        self.assertEqual(model.config._attn_implementation, "sdpa")


class Counters(unittest.TestCase):
    def test_they_add_up(self):
        for device in DEVICES:
            with self.subTest(device=device.type):
                model = make(qwen2_with_sliding_layers, device)
                wrapped = offload(self, model, epsilon=.1)
                self.assertEqual((wrapped.stats(), wrapped.runtime_stats()), ([], None))
                wrapped.generate(**prompts((400, 300), device), **GREEDY)
                layers, runtime = wrapped.stats(), wrapped.runtime_stats()
                self.assertEqual([layer.layer for layer in layers], [0, 3])  # not the sliding ones
                for name in ("rows_middle", "rows_selected", "rows_fetched", "looks"):
                    self.assertEqual(sum(getattr(layer, name) for layer in layers), getattr(runtime, name), name)
                for name in ("exact", "verified", "dense", "best_effort"):
                    self.assertEqual(sum(getattr(layer, name) for layer in layers), getattr(runtime, f"heads_{name}"))
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
        self.refused(ValueError, "num_layers is 3, must be left out", vattn.transformers.offload, model, num_layers=3)
        self.refused(vattn.InvalidArgumentError, "epsilom", vattn.transformers.offload, model, epsilom=.1)
        sliding = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=64))
        self.refused(ValueError, "no layer of plain full attention", vattn.transformers.offload, sliding)
        self.assertEqual(model.config._attn_implementation, "sdpa")

    def test_calls(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150, 60), DEVICES[0])
        wrapped = offload(self, model)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.refused(ValueError, "pad on the left", wrapped, ids, mask.flip(1), past_key_values=wrapped.cache())
        self.refused(ValueError, "row 1 of the prompt has no token", wrapped, ids, mask * torch.tensor([[1], [0]]),
                     past_key_values=wrapped.cache())
        whole = torch.ones(2, 1, 150, 150, dtype=torch.bool)
        self.refused(NotImplementedError, "2D attention_mask", wrapped, ids, whole, past_key_values=wrapped.cache())
        cache = wrapped.cache()
        self.refused(NotImplementedError, "5 tokens at once after the prompt",
                     lambda: [wrapped(x, past_key_values=cache) for x in (ids[:1, -50:], ids[:1, -5:])])
        with self.assertRaisesRegex(NotImplementedError, "torch.no_grad"):
            wrapped(ids, mask, past_key_values=wrapped.cache())

    def test_a_full_pool(self):
        wrapped = offload(self, make(llama, DEVICES[0]), host_bytes=1 << 20)
        self.refused(vattn.FullError, "host_bytes", wrapped.generate, **prompts((1500,), DEVICES[0]), **GREEDY)

    def test_keys_that_lose_their_layer(self):
        wrapped = offload(self, make(llama, DEVICES[0]))
        cache, rows = wrapped.cache(), torch.zeros(1, 2, 1, 32)
        cache.update(rows, rows, 0)
        self.refused(RuntimeError, "layer 0 has not attended through vattn", cache.update, rows, rows, 1)


if __name__ == "__main__":
    unittest.main()
