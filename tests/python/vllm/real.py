"""A real model for the tests of this folder, and engines over it."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
MODEL = pathlib.Path(os.environ.get("VATTN_VLLM_MODEL", ""))  # a folder; tests/vllm.sh makes it
# float32: on processors without bfloat16 arithmetic everything else is slower by far, and greedy tokens of
# two implementations can be compared.
ENGINE = {"model": str(MODEL), "dtype": "float32", "max_model_len": 4096, "block_size": 32}
TABLES = str(MODEL / "vattn.tables")


def ours(**options):
    """Arguments of an engine that asks for the plug-in, with these options of its."""
    return {"attention_backend": "CUSTOM", "additional_config": {"vattn": options}}


def run(calls=(), seconds=3600, environment=None, **engine):
    """The answer of engine_run.py; engine: arguments over those of ENGINE."""
    with tempfile.TemporaryDirectory() as folder:
        job, answer = pathlib.Path(folder, "job"), pathlib.Path(folder, "answer")
        job.write_text(json.dumps({"engine": ENGINE | engine, "calls": list(calls)}))
        # One process, so that what is refused is told in it; the server's test has several.
        variables = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "engine_run.py"), str(job), str(answer)],
            env=os.environ | variables | (environment or {}),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if not answer.is_file():
            raise AssertionError(f"the engine ended with {done.returncode}:\n{done.stderr[-6000:]}")
        return json.loads(answer.read_text())


def library_text(name, characters):
    """The beginning of a module of Python's standard library."""
    import sysconfig

    return pathlib.Path(sysconfig.get_path("stdlib"), name).read_text()[:characters]
