"""Continuous batching and the server of transformers, with a sparse model."""

import json
from importlib.util import find_spec

import pytest
from served import ask, continued, prompts, serving, sparse
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import lte
from byte_tokenizer import byte_tokenizer
from lte.inference import packed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skips", [False, True])
def test_generate_batch_gives_the_tokens_of_generate(skips, monkeypatch):
    model, sizes, computed = sparse("llama"), [], packed.sparse_ffn
    expected = continued(model, 24)
    if skips:
        monkeypatch.setattr(packed, "sparse_ffn", lambda x, *args: sizes.append(x.numel()) or computed(x, *args))
        lte.optimize_(model)
    greedy = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1)
    in_chunks = ContinuousBatchingConfig(num_blocks=64, block_size=16, max_batch_tokens=128)
    made = model.generate_batch(prompts(), generation_config=greedy, continuous_batching_config=in_chunks)
    assert [one.generated_tokens for one in made.values()] == expected
    assert bool(sizes) == skips


@pytest.mark.skipif(find_spec("fastapi") is None, reason="the server of transformers needs lte[serve]")
def test_the_server_of_transformers(tmp_path):
    model = sparse("llama")
    model.save_pretrained(tmp_path)
    byte_tokenizer(chat_template=CHAT).save_pretrained(tmp_path)
    tokenizer, read = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    name, text = str(tmp_path), "A prompt for"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = tokenizer.decode(read.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    with serving(tmp_path, {}, "--engine", "transformers") as url:
        body = {"model": name, "prompt": text, "max_tokens": 12, "temperature": 0}
        status, answer = ask(f"{url}/v1/completions", body)
        assert (status, json.loads(answer)["choices"][0]["text"]) == (200, expected)
        status, streamed = ask(f"{url}/v1/completions", {**body, "stream": True})
        chunks = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
        whole = "".join(choice["text"] for one in chunks for choice in json.loads(one)["choices"])
        assert whole == expected.rstrip("\N{REPLACEMENT CHARACTER}")  # a stream leaves out half a character at its end
        chat = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert ask(f"{url}/v1/chat/completions", chat)[0] == 200
        assert ask(f"{url}/v1/completions", {**body, "model": "another"})[0] == 400
        assert ask(f"{url}/v1/completions", b'{"model": ')[0] == 422
