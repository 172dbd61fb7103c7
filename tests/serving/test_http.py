"""``lte serve`` with vLLM: many requests at once, streams, chats, clients that leave, and requests that are wrong."""

import asyncio
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from load import run
from served import ask, continued, prompts, serving, sparse

from byte_tokenizer import byte_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(700),
    pytest.mark.skipif(find_spec("vllm") is None, reason="make test-serve has vLLM"),
]

CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
CLIENTS, REQUESTS = (int(os.environ.get(f"LOAD_{name}", usual)) for name, usual in (("CLIENTS", 16), ("REQUESTS", 120)))


def test_many_requests(tmp_path, cache):
    model = sparse("llama")
    model.save_pretrained(tmp_path)
    byte_tokenizer(chat_template=CHAT).save_pretrained(tmp_path)
    expected = {"prompts": prompts(), "tokens": continued(model, 40)}
    name = str(tmp_path)
    options = ("--engine", "vllm", "--enforce-eager", "--max-model-len", "400")  # the last two are of vLLM
    with serving(tmp_path, {"VLLM_CACHE_ROOT": str(cache)}, *options) as url:
        found = asyncio.run(run(url, name, expected, CLIENTS, REQUESTS))
        assert found.items() >= {"right": REQUESTS}.items()

        status, answer = ask(
            f"{url}/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
        )
        assert (status, json.loads(answer)["choices"][0]["message"]["role"]) == (200, "assistant")
        assert ask(f"{url}/v1/completions", b'{"model": ')[0] in (400, 422)
        assert ask(f"{url}/v1/completions", {"model": name, "prompt": [5] * 500})[0] == 400
        assert ask(f"{url}/v1/completions", {"model": "another", "prompt": [5]})[0] == 404

        leaving = subprocess.Popen([sys.executable, "-c", LEAVES, url, name])
        leaving.wait(60)
        until = time.monotonic() + 30
        while (running := metric(url, "vllm:num_requests_running")) and time.monotonic() < until:
            time.sleep(0.5)
        assert running == 0  # nobody computes for a client that left
        assert metric(url, "vllm:request_success_total") >= REQUESTS


LEAVES = """
import json, socket, sys
url, name = sys.argv[1:]
host, port = url.removeprefix("http://").split(":")
body = json.dumps({"model": name, "prompt": [5], "max_tokens": 390, "ignore_eos": True, "stream": True}).encode()
with socket.create_connection((host, int(port))) as one:
    one.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: here\\r\\nContent-Type: application/json\\r\\n")
    one.sendall(b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
    assert one.recv(100)
"""


def metric(url, name):
    """The sum of one of vLLM's metrics over its labels."""
    lines = [line for line in ask(f"{url}/metrics")[1].splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
