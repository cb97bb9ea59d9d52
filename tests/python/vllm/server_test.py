"""vLLM's server with the plug-in: the OpenAI interface answers, and /metrics has our counters."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import real


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server(unittest.TestCase):
    def setUp(self):
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.addCleanup(log.close)
        options = {"vattn": {"epsilon": 0.1}}  # tables are in the model's folder
        self.process = subprocess.Popen(
            [
                # What `vllm serve` runs; that command of the CPU's package looks for package vllm.
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(real.MODEL),
                "--served-model-name", "model", "--port", str(port), "--dtype", "float32",
                "--max-model-len", "4096", "--enforce-eager", "--attention-backend", "CUSTOM",
                "--additional-config", json.dumps(options),
            ],
            env=os.environ
            | {
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
                "HF_HUB_OFFLINE": "1",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.addCleanup(self.stop)
        self.log = log

    def stop(self):
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # of its own session, with its workers
            self.process.wait()

    def fail_with_log(self):
        self.log.seek(0)
        self.fail(f"the server does not answer:\n{self.log.read()[-6000:]}")

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read().decode()

    def test_it_answers_and_counts(self):
        deadline = time.monotonic() + 1800
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.fail_with_log()
            try:
                self.get("/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        before = self.get("/metrics")
        self.assertRegex(before, r'vattn_steps_total\{rank="0"\} 0\.0')
        text = real.library_text("queue.py", 6000)
        answer = json.loads(
            self.get(
                "/v1/completions",
                {"model": "model", "prompt": text, "max_tokens": 16, "temperature": 0, "ignore_eos": True},
            )
        )
        self.assertEqual(answer["usage"]["completion_tokens"], 16)
        self.assertTrue(answer["choices"][0]["text"].strip())
        time.sleep(1.5)
        metrics = self.get("/metrics")
        self.assertIn("# TYPE vattn_rows_selected_total counter", metrics)
        value = {
            name: float(number)
            for name, number in re.findall(r'^(vattn_\w+)\{rank="0"\} (\S+)$', metrics, re.M)
        }
        self.assertGreater(value["vattn_steps_total"], 0)
        self.assertGreater(value["vattn_rows_selected_total"], 0)
        self.assertGreater(value["vattn_bytes_fetched_total"], 0)
        self.assertEqual(value["vattn_requests_refused_total"], 0)
        self.assertEqual(value["vattn_step_tokens_total"], 15)
        self.assertEqual(value["vattn_prompt_tokens_total"], answer["usage"]["prompt_tokens"])
        self.assertIn("vllm:", metrics)


if __name__ == "__main__":
    unittest.main()
