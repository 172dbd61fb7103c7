"""Tiny sparse models that greedy decoding tells apart from their dense form, and engines in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

import lte

VOCABULARY = 512
LENGTHS = (4, 19, 70, 345)
"""Of the prompts, in tokens."""
NEW = (3, 24, 17, 9)
"""Tokens that requests of unequal length make."""
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
_OPT = {
    name: size for name, size in _SIZES.items() if name not in ("num_key_value_heads", "head_dim")
}  # vLLM reads them
SIZES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "phi3": _SIZES,
    "opt": {**_OPT, "ffn_dim": 256, "word_embed_proj_dim": 128, "init_std": 0.15},
    "gpt2": {"vocab_size": VOCABULARY},
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a test sends its functions to the workers
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # fewer processes, so an engine starts sooner
    "VLLM_NO_USAGE_STATS": "1",
}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([one])} for one in prompts()]


def dense(family: str, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES[family], "eos_token_id": None, **overrides}
    return AutoModelForCausalLM.from_config(tiny_config(family, **sizes)).eval()


def sparse(family: str, sparsity: float = 0.7, **options: Any) -> PreTrainedModel:
    """An LTE model in mode hard, with thresholds for this sparsity on random tokens."""
    model = lte.sparsify_(dense(family), lte.LTEConfig(expert_size=8, **options))
    lte.set_mode_(model, "hard")
    lte.calibrate_(model, batches(), sparsity)
    return model


@torch.no_grad()
def continued(model: PreTrainedModel, new: int) -> list[list[int]]:
    """The greedy continuation of each prompt by transformers, one prompt at a time."""
    options = {"do_sample": False, "max_new_tokens": new}
    return [model.generate(torch.tensor([one]), **options)[0, len(one) :].tolist() for one in prompts()]


def serve(folder: Path, cache: Path, *, logprobs: bool = False, **engine: Any) -> dict[str, Any]:
    """What ``engine.py`` found with this model. Keywords are vLLM's."""
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 400, "skip_tokenizer_init": True}
    case = {
        "engine": {"model": str(folder), **usual, **engine},
        "prompts": prompts(),
        "lengths": NEW,
        "logprobs": logprobs,
    }
    path = folder / "case.json"
    path.write_text(json.dumps(case))
    made = start([str(Path(__file__).with_name("engine.py")), str(path)], cache)
    assert made.returncode == 0, (made.stdout + made.stderr)[-6000:]
    return {**json.loads(made.stdout.rpartition("FOUND ")[2].splitlines()[0]), "log": made.stdout + made.stderr}


def start(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


def ask(url: str, body: Any = None) -> tuple[int, str]:
    """The status of a request, and its answer as text."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextmanager
def serving(folder: Path, more: dict[str, str], *options: str) -> Iterator[str]:
    """Run ``lte serve`` on a free port, and give its address. Ctrl-C ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lte.cli.main", "serve", str(folder), "--port", str(port), *options]
    environment = {**os.environ, **ENVIRONMENT, **more}
    log = (folder / "log.txt").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, server, folder / "log.txt")
        yield url
        assert server.poll() is None
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130, -signal.SIGINT)
    finally:
        server.kill()
        server.wait()
        log.close()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 500) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if ask(f"{url}/health")[0] == 200:
                return
        except OSError:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
        time.sleep(1)
