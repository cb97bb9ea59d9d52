"""vattn.transformers: the arguments that `generate` has, and the habits of code that calls it."""

import inspect
import unittest
import warnings

import torch
import vattn.transformers
from small_models import CUDA, DEVICES, GREEDY, SMALL, llama, make, offload, prompts, qwen2
from transformers import BatchEncoding, DynamicCache, GenerationConfig

CPU = DEVICES[0]
DENSE = SMALL | {"policy": "dense"}


class Arguments(unittest.TestCase):
    def setUp(self):
        self.model, self.inputs = make(llama, CPU), prompts((120, 70), CPU)
        self.want = self.model.generate(**self.inputs, **GREEDY).tolist()
        self.wrapped = offload(self, self.model, policy="dense")

    def offloaded(self, out):
        """out is what the stock model generates, and came from vattn."""
        self.assertEqual(out.tolist(), self.want)
        self.assertEqual([layer.steps for layer in self.wrapped.stats()], [23] * 4)

    def test_ids_under_every_name(self):
        ids, mask = self.inputs["input_ids"], {"attention_mask": self.inputs["attention_mask"]}
        generate = self.wrapped.generate
        self.offloaded(generate(ids, **mask, **GREEDY))
        self.offloaded(generate(inputs=ids, **mask, **GREEDY))
        self.offloaded(generate(input_ids=ids, **mask, **GREEDY))
        self.offloaded(generate(BatchEncoding(dict(self.inputs)), **GREEDY))
        self.offloaded(generate(dict(self.inputs), **GREEDY))
        self.offloaded(generate(ids, **GREEDY))  # the mask follows from pad_token_id
        with self.assertRaisesRegex(ValueError, "inputs and input_ids are both given"):
            generate(ids, input_ids=ids)
        with self.assertRaisesRegex(TypeError, "give attention_mask by its name"):
            generate(ids, self.inputs["attention_mask"])

    def test_what_is_no_prompt_is_named(self):
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        for bad, name, shown in (
            ([[1, 2, 3]], "input_ids", "a list"),
            ("a text", "input_ids", "a str"),
            (ids.numpy(), "input_ids", "a ndarray"),
            (ids[0], "input_ids", r"a Tensor \[120\]"),
        ):
            with self.assertRaisesRegex(TypeError, f"{name} is {shown}, must be a Tensor"):
                self.wrapped.generate(bad, **GREEDY)
        embeds = self.model.get_input_embeddings()(ids)[0].detach()
        with self.assertRaisesRegex(TypeError, "inputs_embeds is a Tensor .*, must be a Tensor"):
            self.wrapped.generate(inputs_embeds=embeds, **GREEDY)
        for bad, error, text in (
            (mask.tolist(), TypeError, "attention_mask is a list, must be a Tensor"),
            (mask[0], TypeError, r"attention_mask is a Tensor \[120\], must be a Tensor"),
            (mask[:, :50], ValueError, r"attention_mask has shape \[2, 50\], must be \[2, 120\]"),
            (mask[:1], ValueError, r"attention_mask has shape \[1, 120\], must be \[2, 120\]"),
        ):
            with self.assertRaisesRegex(error, text):
                self.wrapped.generate(ids, attention_mask=bad, **GREEDY)
        with self.assertRaisesRegex(TypeError, "generation_config is a dict, must be"):
            self.wrapped.generate(**self.inputs, generation_config={"max_new_tokens": 3})
        self.offloaded(self.wrapped.generate(**self.inputs, **GREEDY))

    def test_the_cache_under_both_names(self):
        for name in ("cache", "past_key_values"):
            cache = self.wrapped.cache(100)
            out = self.wrapped.generate(**self.inputs, **GREEDY, **{name: cache})
            self.offloaded(out)
            self.assertEqual(cache.get_seq_length(), 143)
            self.assertIs(self.wrapped.last_cache, cache)
            mask = torch.nn.functional.pad(self.inputs["attention_mask"], (0, 24), value=1)
            more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 5}
            self.wrapped.generate(out, **more, **{name: cache})
            self.assertEqual(cache.get_seq_length(), 148)
        with self.assertRaisesRegex(ValueError, "cache and past_key_values are both given"):
            self.wrapped.generate(
                **self.inputs, cache=cache, past_key_values=self.wrapped.cache()
            )

    def test_no_call_warns_of_names(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            self.wrapped.generate(**self.inputs, **GREEDY)

    def test_embeddings_and_nothing(self):
        embeds = self.model.get_input_embeddings()(self.inputs["input_ids"]).detach()
        mask = {"attention_mask": self.inputs["attention_mask"]}
        out = self.wrapped.generate(inputs_embeds=embeds, **mask, **GREEDY)
        self.assertEqual(out.tolist(), [row[120:] for row in self.want])
        self.assertEqual([layer.steps for layer in self.wrapped.stats()], [23] * 4)
        out = self.wrapped.generate(**self.inputs, inputs_embeds=embeds, **GREEDY)
        self.offloaded(out)
        self.wrapped.close()
        want = self.model.generate(bos_token_id=3, **GREEDY).tolist()
        wrapped = offload(self, self.model, policy="dense")
        self.assertEqual(wrapped.generate(bos_token_id=3, **GREEDY).tolist(), want)

    def test_settings_in_a_config(self):
        config = GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
        self.offloaded(self.wrapped.generate(**self.inputs, generation_config=config))
        self.offloaded(self.wrapped.generate(**self.inputs, max_length=144, do_sample=False))
        self.model.generation_config.cache_implementation = "static"  # the model's own habit
        self.offloaded(self.wrapped.generate(**self.inputs, **GREEDY))

    def test_what_is_not_served_is_named(self):
        def decode(model, input_ids, **_):
            raise AssertionError("it must not be called")

        config = GenerationConfig(do_sample=False, cache_implementation="static")
        for arguments, text in (
            ({"assistant_model": make(llama, CPU)}, "assistant_model is LlamaForCausalLM"),
            ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is 3"),
            ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
            ({"guidance_scale": 1.5}, "guidance_scale is 1.5"),
            ({"custom_generate": "somewhere/else"}, "custom_generate is 'somewhere/else'"),
            ({"custom_generate": decode}, "custom_generate is decode"),
            ({"generation_config": config}, "cache_implementation is 'static'"),
        ):
            with self.assertRaisesRegex(NotImplementedError, f"{text}, must be left out"):
                self.wrapped.generate(**self.inputs, **arguments)
        self.offloaded(self.wrapped.generate(**self.inputs, **GREEDY, guidance_scale=1.0))

    def test_chunks_are_read(self):
        out = self.wrapped.generate(**self.inputs, **GREEDY, prefill_chunk_size=100)
        self.assertEqual(out.tolist(), self.want)
        self.assertEqual([layer.steps for layer in self.wrapped.stats()], [23] * 4)

    def test_several_tokens_of_a_forward(self):
        ids = self.inputs["input_ids"][:1]
        cache = self.wrapped.cache()
        with torch.no_grad():
            want = self.model(ids, use_cache=False).logits[:, 100:]
            self.wrapped(ids[:, :100], cache=cache)
            got = self.wrapped(ids[:, 100:], cache=cache).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        self.assertEqual(cache.get_seq_length(), 120)

    def test_chunks_with_padding_anywhere(self):
        ids = torch.randint(1, 89, (3, 60))
        mask = torch.ones_like(ids)
        mask[0, :7], mask[1, 30:34], mask[2, 33:] = 0, 0, 0  # before, between and after a prompt of 32
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache = self.wrapped.cache()
        with torch.no_grad():
            for begin, end in ((0, 32), (32, 33), (33, 50), (50, 60)):
                part = {
                    "attention_mask": mask[:, :end],
                    "position_ids": places[:, begin:end],
                }
                got = self.wrapped(ids[:, begin:end], cache=cache, **part).logits
                for row in range(3):
                    real = mask[row, :end].bool()
                    want = self.model(ids[row : row + 1, :end][:, real], use_cache=False).logits[0]
                    new = int(mask[row, begin:end].sum())
                    torch.testing.assert_close(
                        got[row][mask[row, begin:end].bool()],
                        want[len(want) - new :],
                        rtol=1e-4,
                        atol=1e-4,
                    )


class OwnAttention(unittest.TestCase):
    """Calls that need the model's own attention run on it, with a warning."""

    def test_attentions(self):
        model, inputs = make(llama, CPU), prompts((60, 40), CPU)
        model.set_attn_implementation("eager")
        asked = GREEDY | {"output_attentions": True, "return_dict_in_generate": True}
        for extra in ({}, {"use_cache": False}):
            want = model.generate(**inputs, **asked, **extra)
            with vattn.transformers.offload(model, **DENSE) as wrapped:
                with self.assertWarnsRegex(UserWarning, "with nothing offloaded"):
                    got = wrapped.generate(**inputs, **asked, **extra)
                self.assertEqual(model.config._attn_implementation, "vattn")
                self.assertEqual(wrapped.stats(), [])
                with self.assertRaisesRegex(ValueError, "cache is given, must be left out"):
                    wrapped.generate(**inputs, **asked, cache=wrapped.cache())
                with self.assertRaisesRegex(ValueError, "output_attentions is True"):
                    wrapped(**inputs, cache=wrapped.cache(), output_attentions=True)
            self.assertEqual(got.sequences.tolist(), want.sequences.tolist())
            self.assertEqual(len(got.attentions), len(want.attentions))
            for a, b in zip(got.attentions, want.attentions):
                for x, y in zip(a, b):
                    torch.testing.assert_close(x, y)

    def test_a_setting_of_the_model(self):
        model, inputs = make(llama, CPU), prompts((60,), CPU)
        model.generation_config.use_cache = False
        want = model.generate(**inputs, **GREEDY).tolist()
        wrapped = offload(self, model, policy="dense")
        with self.assertWarnsRegex(UserWarning, "use_cache is False"):
            self.assertEqual(wrapped.generate(**inputs, **GREEDY).tolist(), want)
        got = wrapped.generate(**inputs, **GREEDY, use_cache=True)
        self.assertEqual(got.tolist(), want)
        self.assertEqual(len(wrapped.stats()), 4)


class Habits(unittest.TestCase):
    def test_generate_of_the_model_itself(self):
        model, inputs = make(llama, CPU), prompts((120, 70), CPU)
        want = model.generate(**inputs, **GREEDY).tolist()
        with vattn.transformers.offload(model, **DENSE) as wrapped:
            self.assertEqual(model.generate(**inputs, **GREEDY).tolist(), want)
            self.assertEqual([layer.steps for layer in wrapped.stats()], [23] * 4)
        self.assertEqual(model.generate(**inputs, **GREEDY).tolist(), want)
        self.assertNotIn("generate", vars(model))

    def test_generate_within_generate(self):
        """A streamer that asks a model: its own is refused, its wrap and another one answer."""
        model, inputs = make(llama, CPU), prompts((120, 70), CPU)
        other, short = make(qwen2, CPU), prompts((90,), CPU)
        want = model.generate(**inputs, **GREEDY).tolist()
        wanted = other.generate(**short, **GREEDY).tolist()

        class Asks:
            def __init__(self, ask):
                self.ask, self.answer = ask, None

            def put(self, tokens):
                self.answer = self.ask(**short, **GREEDY)

            def end(self):
                pass

        one = {name: value[1:, -70:] for name, value in inputs.items()}
        with (
            vattn.transformers.offload(model, **DENSE) as wrapped,
            vattn.transformers.offload(other, **DENSE) as second,
        ):
            with self.assertRaisesRegex(
                RuntimeError, "generate of LlamaForCausalLM is called, .* must be `generate` of the"
            ):
                wrapped.generate(**one, **GREEDY, streamer=Asks(model.generate))
            asks = Asks(other.generate)
            got = wrapped.generate(**one, **GREEDY, streamer=asks)
            self.assertEqual(got[0, -24:].tolist(), want[1][-24:])
            self.assertEqual(asks.answer.tolist(), wanted)
            self.assertEqual([layer.steps for layer in second.stats()], [23] * 4)
            asks = Asks(wrapped.generate)
            got = wrapped.generate(**one, **GREEDY, streamer=asks)
            self.assertEqual(got[0, -24:].tolist(), want[1][-24:])
            self.assertEqual(asks.answer.shape, (1, 90 + 24))

    def test_what_the_model_has(self):
        model = make(llama, CPU)
        wrapped = offload(self, model)
        self.assertIs(wrapped.config, model.config)
        self.assertEqual((wrapped.device, wrapped.dtype), (model.device, model.dtype))
        self.assertEqual(
            [id(x) for x in wrapped.parameters()], [id(x) for x in model.parameters()]
        )
        self.assertTrue(wrapped.can_generate())
        with self.assertRaisesRegex(AttributeError, "nothing_like_it"):
            wrapped.nothing_like_it

    def test_methods_that_return_the_model(self):
        model, inputs = make(llama, CPU), prompts((60,), CPU)
        want = model.generate(**inputs, **GREEDY).tolist()
        for call in ("eval", "float", "cpu", "to", "train", "requires_grad_"):
            with self.subTest(call=call):
                given = {"to": ["cpu"], "train": [False], "requires_grad_": [False]}.get(call, [])
                wrapped = getattr(vattn.transformers.offload(model, **DENSE), call)(*given)
                self.addCleanup(wrapped.close)
                self.assertIs(type(wrapped), vattn.transformers.OffloadedModel)
                self.assertEqual(wrapped.generate(**inputs, **GREEDY).tolist(), want)
                self.assertEqual(len(wrapped.stats()), 4)
        names = list(inspect.signature(model.forward).parameters)
        self.assertEqual(list(inspect.signature(wrapped.forward).parameters), names)

    def test_what_is_set_is_the_models(self):
        model, inputs = make(llama, CPU), prompts((60,), CPU)
        wrapped = offload(self, model, policy="dense")
        asked = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
        wrapped.generation_config = asked
        self.assertIs(model.generation_config, asked)
        self.assertEqual(wrapped.generate(**inputs).shape, (1, 63))
        wrapped.note = "x"
        self.assertEqual(model.note, "x")
        del wrapped.note
        self.assertFalse(hasattr(model, "note"))
        self.assertIn("generation_config", dir(wrapped))
        self.assertIn("OffloadedModel of LlamaForCausalLM, options", repr(wrapped))
        wrapped.close()
        self.assertIn("LlamaForCausalLM, closed", repr(wrapped))

    def test_pipeline(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, pipeline

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(89)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
        model = make(llama, CPU)
        asked = {"max_new_tokens": 8, "do_sample": False}
        text = " ".join(f"w{i}" for i in range(1, 80))
        device = {"device": -1} if not CUDA else {"device": "cpu"}
        make_pipeline = lambda m: pipeline("text-generation", m, tokenizer=tokenizer, **device)
        want = make_pipeline(model)(text, **asked)
        wrapped = offload(self, model, policy="dense")
        for given in (wrapped, model):
            self.assertEqual(make_pipeline(given)(text, **asked), want)
            self.assertEqual([layer.steps for layer in wrapped.stats()], [7] * 4)
            wrapped.last_cache = None

    @torch.no_grad()
    def test_a_cache_that_the_model_made(self):
        model, inputs = make(llama, CPU), prompts((60,), CPU)
        wrapped = offload(self, model)
        made = wrapped(**inputs)
        self.assertIsInstance(made.past_key_values, DynamicCache)
        with self.assertRaisesRegex(TypeError, "cache is a DynamicCache, must be made by"):
            wrapped(torch.tensor([[5]]), past_key_values=made.past_key_values)


if __name__ == "__main__":
    unittest.main()
