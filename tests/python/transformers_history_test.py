"""vattn.transformers: masks, padding and edited histories after the prompt."""

import unittest

import torch
from small_models import (
    DEVICES,
    GREEDY,
    llama,
    make,
    offload,
    prompts,
    qwen2_with_sliding_layers,
)
from torch.nn.functional import pad
from transformers import DynamicCache

CPU = DEVICES[0]
SHORT = {"do_sample": False, "max_new_tokens": 8}


class Turns(unittest.TestCase):
    """Second calls of `generate` with one cache, against the stock model with its own."""

    def compare(self, model, inputs, second, lengths=(200, 120)):
        """second(first answers) -> arguments of the second call."""
        model = make(model, CPU)
        answers = []
        for wrapped in (None, model):
            if wrapped is None:
                generate, cache = model.generate, DynamicCache(config=model.config)
            else:
                wrapped = offload(self, model, policy="dense")
                generate, cache = wrapped.generate, wrapped.cache(200)
            first = generate(**inputs, **SHORT, past_key_values=cache)
            answers.append(generate(**second(first), **SHORT, past_key_values=cache).tolist())
        self.assertEqual(answers[1], answers[0])
        wrapped.close()

    def test_padded_between_turns(self):
        inputs = prompts((200, 120), CPU)
        for lengths in ((30, 12), (5, 30), (1, 2)):
            more = prompts(lengths, CPU, seed=7)

            def second(first):
                mask = pad(inputs["attention_mask"], (0, first.shape[1] - 200), value=1)
                return {
                    "input_ids": torch.cat([first, more["input_ids"]], 1),
                    "attention_mask": torch.cat([mask, more["attention_mask"]], 1),
                }

            # Stock sliding layers forget what a mask hid: full attention alone is compared.
            with self.subTest(lengths=lengths):
                self.compare(llama, inputs, second)

    def test_without_a_mask(self):
        inputs = prompts((200, 120), CPU)
        more = prompts((30, 30), CPU, seed=7)["input_ids"]
        for model in (llama, qwen2_with_sliding_layers):
            self.compare(
                model,
                {"input_ids": inputs["input_ids"]},
                lambda first: {"input_ids": torch.cat([first, more], 1)},
            )

    def test_new_tokens_alone(self):
        inputs = prompts((200, 120), CPU)
        more = prompts((6, 6), CPU, seed=7)["input_ids"]
        self.compare(
            llama,
            inputs,
            lambda first: {
                "input_ids": torch.cat([first[:, -1:], more], 1),
                "attention_mask": pad(inputs["attention_mask"], (0, 14), value=1),
            },
        )

    def test_embeddings(self):
        model = make(llama, CPU)
        embed = model.get_input_embeddings()
        ids, more = prompts((150,), CPU)["input_ids"], prompts((7,), CPU, seed=7)["input_ids"]
        want = model.generate(inputs_embeds=embed(ids), **SHORT)
        whole = torch.cat([ids, want, more], 1)
        after = model.generate(whole, **SHORT)[:, whole.shape[1] :]
        wrapped = offload(self, model, policy="dense")
        cache = wrapped.cache(200)
        first = wrapped.generate(inputs_embeds=embed(ids), past_key_values=cache, **SHORT)
        self.assertEqual(first.tolist(), want.tolist())
        out = wrapped.generate(inputs_embeds=embed(whole), past_key_values=cache, **SHORT)
        self.assertEqual(out.tolist(), after.tolist())
        with self.assertRaisesRegex(ValueError, "must have more than the"):
            wrapped.generate(inputs_embeds=embed(ids), past_key_values=cache, **SHORT)

    def test_beams_on_a_cache_of_prompts(self):
        model, inputs = make(llama, CPU), prompts((120, 90), CPU)
        beams = SHORT | {"num_beams": 3}
        want = model.generate(**inputs, **beams).tolist()
        wrapped = offload(self, model, policy="dense")
        cache = wrapped.cache(200)
        head = {name: x[:, :-1] for name, x in inputs.items()}
        head["position_ids"] = (head["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            wrapped(**head, past_key_values=cache)
        got = wrapped.generate(**inputs, past_key_values=cache, **beams)
        self.assertEqual(got.tolist(), want)


class Edited(unittest.TestCase):
    """The ids that `generate` is given are compared with those that the cache holds."""

    def test_the_differing_tail_is_read_again(self):
        for kind in (llama, qwen2_with_sliding_layers):
            for first_changed in (0, 100, 179, 185, 187):
                with self.subTest(model=kind.__name__, first_changed=first_changed):
                    model, inputs = make(kind, CPU), prompts((180, 150), CPU)
                    mask = pad(inputs["attention_mask"], (0, 8), value=1)
                    with offload(self, model, policy="dense") as wrapped:
                        cache = wrapped.cache(200)
                        ids = wrapped.generate(**inputs, past_key_values=cache, **SHORT)
                        ids[:, first_changed:] = (ids[:, first_changed:] + 5) % 80 + 1
                        out = wrapped.generate(
                            ids, attention_mask=mask, past_key_values=cache, **SHORT
                        )
                    want = model.generate(ids, attention_mask=mask, **SHORT)
                    self.assertEqual(out.tolist(), want.tolist())

    def test_another_prompt_starts_anew(self):
        model = make(llama, CPU)
        old, new = prompts((100,), CPU), prompts((130,), CPU, seed=9)
        want = model.generate(**new, **SHORT).tolist()
        wrapped = offload(self, model, policy="dense")
        cache = wrapped.cache(100)
        wrapped.generate(**old, past_key_values=cache, **SHORT)
        got = wrapped.generate(**new, past_key_values=cache, **SHORT)
        self.assertEqual(got.tolist(), want)

    def test_the_same_prompt_again(self):
        model, inputs = make(llama, CPU), prompts((100, 60), CPU)
        want = model.generate(**inputs, **SHORT).tolist()
        wrapped = offload(self, model, policy="dense")
        cache = wrapped.cache(100)
        for _ in range(3):
            got = wrapped.generate(**inputs, past_key_values=cache, **SHORT)
            self.assertEqual(got.tolist(), want)

    def test_another_number_of_rows_is_refused(self):
        wrapped = offload(self, make(llama, CPU))
        cache = wrapped.cache(100)
        wrapped.generate(**prompts((60,), CPU), past_key_values=cache, **SHORT)
        with self.assertRaisesRegex(ValueError, "has 2 rows, the cache 1"):
            wrapped.generate(**prompts((90, 80), CPU), past_key_values=cache, **SHORT)


class Masks(unittest.TestCase):
    @torch.no_grad()
    def test_a_prompt_with_padding_anywhere(self):
        model = make(llama, CPU)
        ids = prompts((100, 100, 100), CPU)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, 30:45], mask[1, :20], mask[1, 60], mask[2, 80:] = 0, 0, 0, 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        new, wide = torch.tensor([[5], [6], [7]]), pad(mask, (0, 1), value=1)
        step = {"attention_mask": wide, "position_ids": wide.cumsum(1)[:, -1:] - 1}
        out = []
        for offloaded in (False, True):
            called = offload(self, model, policy="dense") if offloaded else model
            cache = called.cache() if offloaded else DynamicCache(config=model.config)
            prompt = called(
                ids, attention_mask=mask, position_ids=places, past_key_values=cache
            ).logits
            out.append((prompt[mask.bool()], called(new, **step, past_key_values=cache).logits))
        for got, want in zip(out[1], out[0]):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_what_the_cache_holds_stays_as_it_was_read(self):
        model, inputs = make(llama, CPU), prompts((100, 60), CPU)
        wrapped = offload(self, model, policy="dense")
        cache = wrapped.cache()
        wrapped(**inputs, past_key_values=cache)
        new, mask = torch.tensor([[5], [6]]), pad(inputs["attention_mask"], (0, 1), value=1)
        hidden, shown = mask.clone(), mask.clone()
        hidden[:, 50:60], shown[1, 20:] = 0, 1
        for wrong, text in (
            (hidden, "attention_mask differs at token 50"),
            (shown, "attention_mask differs at token 20"),
            (mask[:, 1:], r"attention_mask has shape \[2, 100\], must be \[2, 101\]"),
            (None, "attention_mask is left out, must be given"),
        ):
            with self.assertRaisesRegex(ValueError, text):
                wrapped(new, attention_mask=wrong, past_key_values=cache)
            self.assertEqual(cache.get_seq_length(), 100)
        want = model(pad(inputs["input_ids"], (0, 1), value=5)[:1], use_cache=False).logits
        got = wrapped(new, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(got[0, -1], want[0, -1], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_packed_sequences_are_refused(self):
        stock, wrapped = make(llama, CPU), offload(self, make(llama, CPU), policy="dense")
        ids = prompts((100,), CPU)["input_ids"]
        for places in ([60, 40], [30, 30, 40], [99, 1]):
            packed = torch.cat([torch.arange(n) for n in places])[None]
            with self.assertRaisesRegex(
                ValueError, f"position_ids start again at token {places[0]}: packed"
            ):
                wrapped(ids, position_ids=packed, past_key_values=wrapped.cache())
            with self.assertRaisesRegex(ValueError, "packed sequences are not served"):
                wrapped.generate(ids, position_ids=packed, **GREEDY)
            # With a mask, transformers reads what it shows together, and so does this.
            mask = torch.ones_like(ids)
            want = wrapped.model(ids, attention_mask=mask, position_ids=packed, use_cache=False)
            asked = {"attention_mask": mask, "position_ids": packed}
            got = wrapped(ids, **asked, past_key_values=wrapped.cache())
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
            want = stock.generate(ids, **asked, **GREEDY)
            self.assertEqual(wrapped.generate(ids, **asked, **GREEDY).tolist(), want.tolist())
        jumps = torch.arange(100)[None] * 2  # positions may leave some out
        wrapped(ids, position_ids=jumps, past_key_values=wrapped.cache())

    def test_padding_on_the_right_is_refused(self):
        inputs = prompts((150, 60), CPU)
        wrapped = offload(self, make(llama, CPU))
        with self.assertRaisesRegex(ValueError, "pad on the left"):
            wrapped.generate(
                inputs["input_ids"], attention_mask=inputs["attention_mask"].flip(1), **GREEDY
            )


if __name__ == "__main__":
    unittest.main()
