"""vattn.transformers: whatever a wrap replaces of a model is as it was when the wrap has ended."""

import copy
import functools
import gc
import threading
import types
import unittest
from unittest import mock

import torch
import vattn.transformers
from small_models import DEVICES, GREEDY, SHAPE, SMALL, llama, make, offload, prompts
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Phi3Config, Phi3ForCausalLM
from transformers.generation.streamers import BaseStreamer

DENSE = SMALL | {"policy": "dense"}


class StrictConfig(Phi3Config):
    """Takes a number for its window and nothing else, as configs of some families."""

    def __setattr__(self, name, value):
        if name == "sliding_window" and not isinstance(value, int):
            raise TypeError(f"sliding_window is {value!r}")
        super().__setattr__(name, value)


def phi3():
    """Has a window that no context reaches, which is taken out of its config."""
    return Phi3ForCausalLM(StrictConfig(**SHAPE, sliding_window=4096))


def gemma3():
    """Has parts with configs of their own."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = SHAPE | {"head_dim": 32, "layer_types": ["full_attention", "sliding_attention"] * 2}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, image_token_id=88)
    )


def state(model):
    """All that the model has itself, its configs in full, and the hooks of every module."""
    own = {
        name: dict(value) if isinstance(value, dict) else value
        for name, value in vars(model).items()
    }
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    configs += [getattr(model.config, key) for key in model.config.sub_configs]
    settings = [(config._attn_implementation, copy.deepcopy(vars(config))) for config in configs]
    hooks = [
        {name: dict(value) for name, value in vars(module).items() if name.endswith("_hooks")}
        for module in model.modules()
    ]
    return own, settings, hooks


class Stop(BaseException):
    """Neither an error nor Ctrl-C."""


class Stopping(BaseStreamer):
    """Raises with the third token."""

    def __init__(self):
        self.left = 3

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            raise Stop

    def end(self):
        pass


class Called:
    """A `generate` that is an object, and counts its calls."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return type(self.model).generate(self.model, *args, **kwargs)


def closed(case, model, inputs):
    wrapped = vattn.transformers.offload(model, **DENSE)
    wrapped.generate(**inputs, **GREEDY)
    wrapped.close()


def left(case, model, inputs):
    with vattn.transformers.offload(model, **DENSE) as wrapped:
        wrapped.generate(**inputs, **GREEDY)


def left_by_an_error(case, model, inputs):
    with case.assertRaises(Stop), vattn.transformers.offload(model, **DENSE) as wrapped:
        wrapped.generate(**inputs, **GREEDY, streamer=Stopping())


def left_within_a_call_of_its_own(case, model, inputs):
    with case.assertRaises(Stop), vattn.transformers.offload(model, **DENSE) as wrapped:
        wrapped.generate(**inputs, **GREEDY, use_cache=False, streamer=Stopping())


def collected(case, model, inputs):
    vattn.transformers.offload(model, **DENSE).generate(**inputs, **GREEDY)
    gc.collect()


def collected_after_an_error(case, model, inputs):
    wrapped = vattn.transformers.offload(model, **DENSE)
    try:
        wrapped.generate(**inputs, **GREEDY, streamer=Stopping())
    except Stop:
        pass
    del wrapped
    gc.collect()


def two_wraps(case, model, inputs):
    wraps = [vattn.transformers.offload(model, **DENSE) for _ in range(2)]
    wraps[0].close()
    wraps[1].generate(**inputs, **GREEDY)
    wraps[1].close()


def closed_within_a_call(case, model, inputs):
    class Closing(Stopping):
        def put(self, value):
            wrapped.close()

    wrapped = vattn.transformers.offload(model, **DENSE)
    wrapped.generate(**inputs, **GREEDY, use_cache=False, streamer=Closing())


def stopped_on_the_way(case, model, inputs):
    whole = type(model).set_attn_implementation
    hook = type(model).register_forward_hook

    def stop(function):
        def call(*args, **kwargs):
            function(*args, **kwargs)
            raise Stop

        return call

    for name, function in (("set_attn_implementation", whole), ("register_forward_pre_hook", None)):
        replaced = stop(function) if function is not None else mock.Mock(side_effect=Stop)
        with mock.patch.object(type(model), name, replaced), case.assertRaises(Stop):
            vattn.transformers.offload(model, **DENSE)
    with mock.patch.object(type(model), "register_forward_hook", mock.Mock(side_effect=Stop)):
        with case.assertRaises(Stop):
            vattn.transformers.offload(model, **DENSE)
    case.assertIs(type(model).register_forward_hook, hook)


def refused(case, model, inputs):
    for options in ({"num_layers": 3}, {"epsilom": 1}, {"policy": "denze"}):
        with case.assertRaises((ValueError, TypeError)):
            vattn.transformers.offload(model, **options)


ENDS = (
    closed,
    left,
    left_by_an_error,
    left_within_a_call_of_its_own,
    collected,
    collected_after_an_error,
    two_wraps,
    closed_within_a_call,
    stopped_on_the_way,
    refused,
)


class Restored(unittest.TestCase):
    def as_before(self, model):
        inputs = prompts((40,), DEVICES[0])
        before = state(model)
        for end in ENDS:
            with self.subTest(end=end.__name__):
                end(self, model, inputs)
                for was, now in zip(before, state(model), strict=True):
                    self.assertEqual(now, was)

    def test_models(self):
        for kind in (llama, phi3, gemma3):
            with self.subTest(model=kind.__name__):
                self.as_before(make(kind, DEVICES[0]))

    def test_attentions_of_the_parts(self):
        model = make(gemma3, DEVICES[0])
        model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
        self.as_before(model)
        model.set_attn_implementation({"": "eager", "vision_config": "sdpa", "text_config": "eager"})
        self.as_before(model)

    def test_attributes_and_hooks(self):
        model = make(llama, DEVICES[0])
        for name in ("generate", "forward", "prepare_inputs_for_generation"):
            whole = getattr(model, name)
            if name == "forward":  # of which transformers reads the names of the arguments

                @functools.wraps(whole)
                def own(*args, whole=whole, **kwargs):
                    return whole(*args, **kwargs)

            else:
                own = functools.partial(whole)
            setattr(model, name, own)
        model.register_forward_hook(lambda *_: None)
        model.register_forward_pre_hook(lambda *_: None)
        model.model.layers[1].register_forward_hook(lambda *_: None)
        self.as_before(model)

    def test_a_generate_of_every_kind(self):
        model = make(llama, DEVICES[0])
        for own in (
            functools.partial(model.generate, max_new_tokens=3),
            types.MethodType(lambda self, **kwargs: type(self).generate(self, **kwargs), model),
            Called(model),
            None,
        ):
            model.generate = own
            self.as_before(model)
            self.assertIs(vars(model)["generate"], own)

    def test_what_is_set_meanwhile_stays(self):
        model = make(phi3, DEVICES[0])
        with vattn.transformers.offload(model, **DENSE):
            model.set_attn_implementation("eager")
            model.config.sliding_window = 3000
            model.generate = own = functools.partial(model.generate, **GREEDY)
            handle = model.register_forward_hook(lambda *_: None)
        self.assertEqual(model.config._attn_implementation, "eager")
        self.assertEqual(model.config.sliding_window, 3000)
        self.assertIs(vars(model)["generate"], own)
        self.assertEqual(list(model._forward_hooks), [handle.id])
        inputs = prompts((40,), DEVICES[0])
        want = type(model).generate(model, **inputs, **GREEDY)
        self.assertEqual(model.generate(**inputs).tolist(), want.tolist())
        with vattn.transformers.offload(model, **DENSE):
            model.generate = None
            del model.generate
        self.assertNotIn("generate", vars(model))

    def test_a_config_that_outlives_its_model(self):
        model = make(llama, DEVICES[0])
        config = model.config
        model.wrapped = vattn.transformers.offload(model, **DENSE)
        del model
        gc.collect()
        self.assertEqual(config._attn_implementation, "sdpa")


class OwnGenerate(unittest.TestCase):
    """A model's own `generate` is what its wrap calls, too."""

    def test_is_called(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150, 90), DEVICES[0])
        want = model.generate(**inputs, **GREEDY).tolist()
        model.generate = own = Called(model)
        wrapped = offload(self, model, policy="dense")
        for calls, generate in enumerate((wrapped.generate, model.generate), 1):
            self.assertEqual(generate(**inputs, **GREEDY).tolist(), want)
            self.assertEqual(own.calls, calls)
            self.assertGreater(wrapped.stats()[0].steps, 0)
        twin = copy.deepcopy(model)
        self.assertIsInstance(vars(twin)["generate"], Called)
        self.assertIs(vars(twin)["generate"].model, twin)
        wrapped.close()
        self.assertEqual(model.generate(**inputs, **GREEDY).tolist(), want)
        self.assertEqual(own.calls, 3)

    def test_its_arguments_count(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150,), DEVICES[0])
        model.generate = functools.partial(model.generate, do_sample=False, max_new_tokens=7)
        want = model.generate(**inputs).tolist()
        wrapped = offload(self, model, policy="dense")
        self.assertEqual(wrapped.generate(**inputs).tolist(), want)
        self.assertEqual(wrapped.stats()[0].steps, 6)

    def test_one_that_offloads_nothing_is_refused(self):
        model, inputs = make(llama, DEVICES[0]), prompts((150,), DEVICES[0])
        generate = type(model).generate
        for own, error, text in (
            (lambda **kwargs: kwargs["input_ids"], RuntimeError, "read nothing with the .*cache"),
            (
                lambda cache=None, past_key_values=None, **kwargs: generate(model, **kwargs),
                TypeError,
                "cache is a DynamicCache, must be made by",
            ),
        ):
            model.generate = own
            with offload(self, model, policy="dense") as wrapped:
                with self.assertRaisesRegex(error, text):
                    wrapped.generate(**inputs, **GREEDY)

    def test_set_on_the_wrap_it_is_the_wraps(self):
        model, inputs = make(llama, DEVICES[0]), prompts((50,), DEVICES[0])
        wrapped = offload(self, model, policy="dense")
        wrapped.generate = functools.partial(wrapped.generate, **GREEDY)
        self.assertEqual(wrapped.generate(**inputs).shape, (1, 74))
        self.assertEqual(model.generate(**inputs).shape, (1, 74))
        del wrapped.generate
        self.assertEqual(wrapped.generate(**inputs, max_new_tokens=2).shape, (1, 52))
        wrapped.close()
        self.assertNotIn("generate", vars(model))


class WhyOff(unittest.TestCase):
    """A cache that is used where its model does not attend through vattn: the text says why."""

    def test_the_text_says_why(self):
        model, inputs = make(llama, DEVICES[0]), prompts((60,), DEVICES[0])
        more = {"input_ids": torch.ones(1, 90, dtype=torch.long)}
        for held in (False, True):
            for end, text in (
                ("close", "^the model is not offloaded any more and attends by 'sdpa'"),
                ("eager", "^the model's attention was set to 'eager' after it was offloaded"),
            ):
                model.set_attn_implementation("sdpa")
                wrapped = offload(self, model, policy="dense")
                cache = wrapped.cache(100)
                if held:
                    wrapped.generate(**inputs, **GREEDY, cache=cache)
                tokens = cache.get_seq_length()
                if end == "close":
                    wrapped._end()  # as `close`, but the cache keeps its tokens
                else:
                    model.set_attn_implementation(end)
                calls = (model, functools.partial(type(model).generate, model))
                for call in calls:
                    for given in (inputs, more):
                        with self.assertRaisesRegex(RuntimeError, text):
                            call(**given, past_key_values=cache)
                self.assertEqual(cache.get_seq_length(), tokens)
                wrapped.close()

    def test_offloaded_again_it_goes_on(self):
        model, inputs = make(llama, DEVICES[0]), prompts((60,), DEVICES[0])
        want = model.generate(**inputs, **GREEDY).tolist()
        wrapped = vattn.transformers.offload(model, **DENSE)
        cache = wrapped.cache(100)
        wrapped._end()
        with self.assertRaisesRegex(RuntimeError, "not offloaded any more"):
            model(**inputs, past_key_values=cache)
        with offload(self, model, policy="dense") as again:
            self.assertEqual(again.generate(**inputs, **GREEDY, cache=cache).tolist(), want)

    def test_another_threads_call(self):
        model, inputs = make(llama, DEVICES[0]), prompts((60,), DEVICES[0])
        wrapped = offload(self, model, policy="dense")
        texts = []

        class Other(Stopping):
            def put(self, value):
                def ask():
                    try:
                        wrapped.generate(**inputs, **GREEDY)
                    except RuntimeError as error:
                        texts.append(str(error))

                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()

        wrapped.generate(**inputs, max_new_tokens=2, use_cache=False, streamer=Other())
        self.assertTrue(texts)
        for text in texts:
            self.assertIn("a call on another thread needs it", text)
        self.assertEqual(wrapped.generate(**inputs, **GREEDY).shape, (1, 84))


if __name__ == "__main__":
    unittest.main()
