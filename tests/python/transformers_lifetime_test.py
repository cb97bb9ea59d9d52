"""vattn.transformers: who owns what, and that whatever fails or ends leaves things as they were."""

import copy
import gc
import pickle
import threading
import unittest

import torch
import vattn
import vattn.transformers
from small_models import (
    DEVICES,
    GREEDY,
    SHAPE,
    SMALL,
    llama,
    make,
    offload,
    prompts,
    qwen2_with_sliding_layers,
)
from torch.nn.functional import pad
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

DENSE = SMALL | {"policy": "dense"}


def longer(sequences, seed, tokens=10):
    """sequences and more tokens, with a mask of ones."""
    rows = len(sequences)
    more = prompts((tokens,) * rows, sequences.device, seed=seed)["input_ids"]
    ids = torch.cat([sequences, more], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Copies(unittest.TestCase):
    def test_forks_of_every_row(self):
        for model in (llama, qwen2_with_sliding_layers):
            model = make(model, DEVICES[0])
            inputs = prompts((200, 200), DEVICES[0])
            asked = [longer(inputs["input_ids"], seed) for seed in (5, 6, 7)]
            want = [model.generate(**ids, **GREEDY).tolist() for ids in asked]
            wrapped = offload(self, model, **DENSE)
            cache = wrapped.cache(400)
            with torch.no_grad():
                wrapped(**inputs, past_key_values=cache)
            for copied in (copy.deepcopy, copy.copy):
                for ids, tokens in zip(asked, want):
                    fork = copied(cache)
                    out = wrapped.generate(**ids, past_key_values=fork, **GREEDY)
                    self.assertEqual(out.tolist(), tokens)
                    self.assertEqual(cache.get_seq_length(), 200)
                    fork.close()
            out = wrapped.generate(**asked[0], past_key_values=cache, **GREEDY)
            self.assertEqual(out.tolist(), want[0])

    def test_the_original_may_go_first(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150,), DEVICES[0])
        asked = longer(inputs["input_ids"], 5)
        want = model.generate(**asked, **GREEDY)
        wrapped = offload(self, model, **DENSE)
        cache = wrapped.cache(200)
        with torch.no_grad():
            wrapped(**inputs, past_key_values=cache)
        fork = copy.deepcopy(cache)
        cache.close()
        out = wrapped.generate(**asked, past_key_values=fork, **GREEDY)
        self.assertEqual(out.tolist(), want.tolist())
        fork.close()
        self.assertIsNone(fork.runtime_stats())

    def test_an_empty_cache(self):
        wrapped = offload(self, make(llama, DEVICES[0]), **DENSE)
        fork = copy.deepcopy(wrapped.cache())
        inputs = prompts((100,), DEVICES[0])
        wrapped.generate(**inputs, past_key_values=fork, **GREEDY)
        self.assertEqual(fork.get_seq_length(), 123)

    def test_nothing_is_pickled(self):
        wrapped = offload(self, make(llama, DEVICES[0]))
        for thing in (wrapped, wrapped.cache(), wrapped.model):
            with self.assertRaisesRegex(TypeError, "cannot be pickled"):
                pickle.dumps(thing)

    def test_a_copied_model_is_not_the_offloaded_one(self):
        model, inputs = make(llama, DEVICES[0]), prompts((100,), DEVICES[0])
        want = model.generate(**inputs, **GREEDY).tolist()
        wrapped = offload(self, model, **DENSE)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        self.assertEqual(wrapped.generate(**inputs, **GREEDY).tolist(), want)
        with self.assertRaisesRegex(TypeError, "cache is a DynamicCache"):
            twin.generate(**inputs, **GREEDY)
        twin.set_attn_implementation("sdpa")
        self.assertEqual(twin.generate(**inputs, **GREEDY)[0, 100:].unique().tolist(), [0])


class Wraps(unittest.TestCase):
    def test_the_last_one_gives_the_attention_back(self):
        inputs = prompts((100,), DEVICES[0])
        for implementation in ("sdpa", "eager"):
            for order in ((0, 1), (1, 0)):
                model = make(llama, DEVICES[0])
                model.set_attn_implementation(implementation)
                want = model.generate(**inputs, **GREEDY).tolist()
                wraps = [vattn.transformers.offload(model, **DENSE) for _ in range(2)]
                wraps[order[0]].close()
                self.assertEqual(model.config._attn_implementation, "vattn")
                got = wraps[order[1]].generate(**inputs, **GREEDY)
                self.assertEqual(got.tolist(), want)
                wraps[order[1]].close()
                self.assertEqual(model.config._attn_implementation, implementation)
                self.assertEqual(model.generate(**inputs, **GREEDY).tolist(), want)
                self.assertNotIn("generate", vars(model))

    def test_collection_gives_it_back(self):
        model = make(llama, DEVICES[0])
        wrapped = vattn.transformers.offload(model)
        cache = wrapped.cache()
        del wrapped
        gc.collect()
        self.assertEqual(model.config._attn_implementation, "sdpa")
        inputs = prompts((50,), DEVICES[0])
        model.generate(**inputs, **GREEDY)
        with self.assertRaisesRegex(RuntimeError, "the model is not offloaded any more"):
            model(**inputs, past_key_values=cache)

    def test_a_closed_one_says_so(self):
        model, inputs = make(llama, DEVICES[0]), prompts((50,), DEVICES[0])
        wrapped = vattn.transformers.offload(model)
        wrapped.close()
        wrapped.close()
        for call in (wrapped.generate, wrapped):
            with self.assertRaisesRegex(RuntimeError, "this offloaded model is closed"):
                call(**inputs)
        with self.assertRaisesRegex(RuntimeError, "this offloaded model is closed"):
            wrapped.cache()

    def test_a_cache_of_another_model_is_refused(self):
        # One of the same shapes, whose rows would pass for this model's, and shallower and deeper.
        model, inputs = make(llama, DEVICES[0]), prompts((60,), DEVICES[0])
        wrapped = offload(self, model, policy="dense")
        for layers in (4, 3, 6):
            torch.manual_seed(9)
            other = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers})).eval()
            with offload(self, other, policy="dense") as another:
                cache = another.cache(100)
                out = another.generate(**inputs, cache=cache, **GREEDY)
                for given in (cache, another.cache(100)):
                    with self.assertRaisesRegex(ValueError, "cache holds rows of another model"):
                        wrapped.generate(out, cache=given, **GREEDY)
                    with self.assertRaisesRegex(ValueError, "cache holds rows of another model"):
                        wrapped(out[:, -1:], past_key_values=given)
                self.assertEqual(cache.get_seq_length(), 83)
        # Another wrap of the same model has the same rows.
        with offload(self, model, policy="dense") as again:
            cache = again.cache(100)
            out = again.generate(**inputs, cache=cache, **GREEDY)
            want = model.generate(**inputs, do_sample=False, max_new_tokens=30).tolist()
            more = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(out)}
            self.assertEqual(wrapped.generate(out, cache=cache, **more).tolist(), want)

    def test_a_closed_cache_is_empty(self):
        for kind in (llama, qwen2_with_sliding_layers):
            model, inputs = make(kind, DEVICES[0]), prompts((120, 60), DEVICES[0])
            want = model.generate(**inputs, **GREEDY).tolist()
            wrapped = offload(self, model, policy="dense")
            cache = wrapped.cache(100)
            for _ in range(2):
                self.assertEqual(wrapped.generate(**inputs, cache=cache, **GREEDY).tolist(), want)
                cache.close()
                self.assertEqual(cache.get_seq_length(), 0)

    def test_another_attention_is_named(self):
        model, inputs = make(llama, DEVICES[0]), prompts((50,), DEVICES[0])
        want = model.generate(**inputs, **GREEDY).tolist()
        wrapped = vattn.transformers.offload(model)
        model.set_attn_implementation("eager")
        with self.assertRaisesRegex(RuntimeError, "attention was set to 'eager'"):
            wrapped.generate(**inputs, **GREEDY)
        self.assertEqual(model.generate(**inputs, **GREEDY).tolist(), want)
        wrapped.close()
        self.assertEqual(model.config._attn_implementation, "eager")

    def test_a_refused_model_is_as_before(self):
        shape = {
            "vocab_size": 89,
            "d_model": 64,
            "pad_token_id": 0,
            "eos_token_id": None,
            "decoder_start_token_id": 0,
        }
        t5 = T5ForConditionalGeneration(
            T5Config(**shape, d_ff=64, num_layers=2, num_heads=2, d_kv=32)
        )
        bart = BartForConditionalGeneration(
            BartConfig(
                **shape,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                forced_eos_token_id=None,
            )
        )
        ids = torch.randint(1, 89, (1, 20))
        for model in (t5.eval(), bart.eval()):
            before = model.config._attn_implementation
            want = model.generate(ids, max_new_tokens=5).tolist()
            with self.assertRaisesRegex(ValueError, "is an encoder-decoder model"):
                vattn.transformers.offload(model)
            self.assertEqual(model.config._attn_implementation, before)
            self.assertEqual(model.generate(ids, max_new_tokens=5).tolist(), want)

    def test_threads(self):
        model, inputs = make(llama, DEVICES[0]), prompts((120,), DEVICES[0])
        want = model.generate(**inputs, **GREEDY).tolist()
        wrapped, out = offload(self, model, **DENSE), {}

        def work(i):
            out[i] = wrapped.generate(**inputs, **GREEDY).tolist()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(out, {i: want for i in range(3)})


class Stop(Exception):
    """Raised in the middle of a call."""


class Interrupted(unittest.TestCase):
    """A call that ends within a layer, by Ctrl-C or by an error."""

    def interrupt(self, model, layer, call, error):
        """Lets a layer raise `error` in its call-th call."""
        calls = [0]

        def hook(*_):
            calls[0] += 1
            if calls[0] == call:
                raise error

        handle = model.model.layers[layer].register_forward_hook(hook)
        self.addCleanup(handle.remove)
        return handle

    def test_goes_on_as_before(self):
        for kind in (llama, qwen2_with_sliding_layers):
            for layer, error in enumerate((KeyboardInterrupt, Stop, KeyboardInterrupt, Stop)):
                for call in (1, 2, 6):
                    with self.subTest(model=kind.__name__, layer=layer, call=call):
                        self.goes_on(make(kind, DEVICES[0]), (200, 120), error, layer, call)

    def goes_on(self, model, lengths, error, layer, call):
        inputs = prompts(lengths, DEVICES[0])
        want = model.generate(**inputs, **GREEDY)
        wrapped = offload(self, model, **DENSE)
        cache = wrapped.cache(100)
        handle = self.interrupt(model, layer, call, error)
        with self.assertRaises(error):
            wrapped.generate(**inputs, past_key_values=cache, **GREEDY)
        handle.remove()
        held = cache.get_seq_length()
        done = call - 1 if layer < 3 else call  # the last layer's hook comes after its attention
        self.assertEqual(held, 0 if done == 0 else 200 + done - 1)
        ids = want[:, : max(held, 200) + (held > 200)]
        mask = pad(inputs["attention_mask"], (0, ids.shape[1] - 200), value=1)
        again = wrapped.generate(
            ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=10
        )
        self.assertEqual(again.tolist(), want[:, : ids.shape[1] + 10].tolist())
        wrapped.close()

    def test_crop_counts_what_was_left_behind(self):
        model, inputs = make(llama, DEVICES[0]), prompts((200,), DEVICES[0])
        want = model.generate(**inputs, **GREEDY)
        wrapped = offload(self, model, **DENSE)
        for removed, held in ((0, 203), (1, 203), (2, 202), (300, 0)):
            cache = wrapped.cache(100)
            handle = self.interrupt(model, 2, 5, KeyboardInterrupt)
            with self.assertRaises(KeyboardInterrupt):
                wrapped.generate(**inputs, past_key_values=cache, **GREEDY)
            handle.remove()
            cache.crop(-removed)
            self.assertEqual([layer.tokens for layer in cache.layers], [held] * 4)
            again = wrapped.generate(
                want[:, :204], past_key_values=cache, do_sample=False, max_new_tokens=10
            )
            self.assertEqual(again.tolist(), want[:, :214].tolist())

    def test_a_full_pool_can_be_cropped(self):
        model, inputs = make(llama, DEVICES[0]), prompts((250,), DEVICES[0])
        want = model.generate(**inputs, do_sample=False, max_new_tokens=300)
        wrapped = offload(self, model, **DENSE, host_bytes=3 << 19)
        cache = wrapped.cache()
        with self.assertRaises(vattn.FullError):
            wrapped.generate(
                **inputs, past_key_values=cache, do_sample=False, max_new_tokens=300
            )
        held = cache.get_seq_length()
        self.assertGreater(held, 250)
        cache.crop(-5)
        ids = want[:, : held - 4]  # with a mask: among what was generated is the pad token
        again = wrapped.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=3,
        )
        self.assertEqual(again.tolist(), want[:, : held - 1].tolist())

    def test_the_stock_cache_is_not_taken(self):
        model, inputs = make(llama, DEVICES[0]), prompts((50,), DEVICES[0])
        wrapped = offload(self, model)
        for name in ("past_key_values", "cache"):
            for call in (wrapped.generate, model.generate, wrapped):
                with self.assertRaisesRegex(TypeError, "cache is a DynamicCache, must be made by"):
                    call(**inputs, **{name: DynamicCache(config=model.config)})


if __name__ == "__main__":
    unittest.main()
