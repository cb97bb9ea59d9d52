"""One engine of vLLM in a process of its own: engine_run.py JOB ANSWER, both files of JSON.

JOB: {"engine": arguments of vllm.LLM, "calls": [{"prompts": [text or ids], "tokens": n, "logprobs": n}]}.
ANSWER: {"calls": [[{"ids", "logprobs": [{id: logprob}], "cached"}]], "counters": {name: number},
"vllm": {name: number}, "seconds": [each call's]}, or {"refused": text} where the engine did not start.
"""

import json
import pathlib
import sys
import time


def main(job, answer):
    from vllm import LLM, SamplingParams

    import vattn.vllm

    given = json.loads(pathlib.Path(job).read_text())
    try:
        llm = LLM(disable_log_stats=False, enforce_eager=True, **given["engine"])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test asks for
        reasons = []
        while error is not None:
            reasons.append(str(error))
            error = error.__cause__ or error.__context__
        pathlib.Path(answer).write_text(json.dumps({"refused": "\n".join(reasons)}))
        return
    calls, seconds = [], []
    for call in given["calls"]:
        prompts = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in call["prompts"]]
        sampling = SamplingParams(
            temperature=0, max_tokens=call["tokens"], logprobs=call.get("logprobs"), ignore_eos=True
        )
        begin = time.monotonic()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds.append(time.monotonic() - begin)
        calls.append([_told(one) for one in outputs])
    time.sleep(1)  # for the thread that writes counters
    pathlib.Path(answer).write_text(
        json.dumps(
            {
                "calls": calls,
                "counters": vattn.vllm.counters(),
                "vllm": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")},
                "seconds": seconds,
            }
        )
    )


def _told(output):
    first = output.outputs[0]
    logprobs = first.logprobs or []
    return {
        "ids": list(first.token_ids),
        "text": first.text,
        "logprobs": [{str(i): one.logprob for i, one in step.items()} for step in logprobs],
        "prompt": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
