"""``lte generate`` in process: one prompt, batches, and how it refuses."""

import json

import pytest

from lte.cli import generate
from lte.cli.main import main

TWO = ["--prompt", "1 and 2", "--prompt", "12 and 13 make"]


def run(capfd, model, *given):
    assert main(["generate", str(model), *map(str, given), "--max-new-tokens", "6", "--device", "cpu"]) == 0
    return capfd.readouterr()


def refused(capfd, model, *given):
    assert main(["generate", str(model), *map(str, given), "--device", "cpu"]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("lte: error: ")
    assert len(printed.err.splitlines()) == 1
    return printed.err


def test_one_prompt_streams_and_the_last_line_is_json(sparse, capfd):
    text = run(capfd, sparse, "--prompt", "1 and 2").out
    printed = run(capfd, sparse, "--prompt", "1 and 2", "--json", "--backend", "reference")
    *lines, last = printed.out.splitlines()
    result = json.loads(last)
    assert "\n".join(lines).strip() == text.strip() == result["texts"][0].strip()
    assert 0 < result["sparsity"] < 1
    assert (result["mode"], result["backend"], result["compiled"]) == ("hard", "reference", False)
    assert result["tokens_per_second"] == pytest.approx(sum(result["tokens"]) / result["seconds"], rel=0.05)
    assert "mode hard" in printed.err


@pytest.mark.parametrize("model", ["sparse", "llama", "t5"])
def test_a_batch_gives_each_prompts_own_text(model, files, sparse, capfd, tmp_path):
    folder = sparse if model == "sparse" else files / model
    alone = [json.loads(run(capfd, folder, "--prompt", prompt, "--json").out.splitlines()[-1]) for prompt in TWO[1::2]]
    together = json.loads(run(capfd, folder, *TWO, "--json").out.splitlines()[-1])
    assert together["texts"] == [one["texts"][0] for one in alone]
    assert together["tokens"] == [one["tokens"][0] for one in alone]
    (tmp_path / "prompts.txt").write_text(f"{TWO[1]}\n\n{TWO[3]}\n")
    printed = run(capfd, folder, "--prompts", tmp_path / "prompts.txt", "--batch-size", "1", "--json")
    assert json.loads(printed.out.splitlines()[-1])["texts"] == together["texts"]
    if model == "sparse":
        weights = [n + s for n, s in zip(map(len, TWO[1::2]), together["tokens"], strict=True)]
        mean = sum(one["sparsity"] * w for one, w in zip(alone, weights, strict=True)) / sum(weights)
        assert together["sparsity"] == pytest.approx(mean, abs=1e-6)
    else:
        assert together["sparsity"] is None


@pytest.mark.parametrize(
    ("given", "compile"),
    [([], None), (["--compile"], True), (["--no-compile"], False), (["--compile", "False"], False)],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_compile_is_a_switch(sparse, capfd, monkeypatch, given, compile, place):
    seen, right = [], generate.complete

    def complete(*args, compile, **options):
        seen.append(compile)
        return right(*args, compile=False, **options)

    monkeypatch.setattr(generate, "complete", complete)
    prompt = ["--prompt", "1 and 2"]
    run(capfd, sparse, *(given + prompt if place == "first" else prompt + given))
    assert seen == [compile]


def test_a_seed_repeats(sparse, capfd):
    given = ["--prompt", "1", "--temperature", "2", "--top-p", "0.99", "--top-k", "0"]
    assert run(capfd, sparse, *given, "--seed", "1").out == run(capfd, sparse, *given, "--seed", "1").out
    assert run(capfd, sparse, *given, "--seed", "1").out != run(capfd, sparse, *given, "--seed", "2").out


def test_refusals(files, sparse, tmp_path, capfd):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "either --prompt" in refused(capfd, sparse)
    assert "either --prompt" in refused(capfd, sparse, "--prompt", "a", "--prompts", tmp_path / "empty.txt")
    assert "the file is empty" in refused(capfd, sparse, "--prompts", tmp_path / "empty.txt")
    assert "none.txt" in refused(capfd, sparse, "--prompts", tmp_path / "none.txt")
    assert "prompt is empty" in refused(capfd, sparse, "--prompt", "a", "--prompt", " ")
    assert "not valid Unicode" in refused(capfd, sparse, "--prompt", "a\udcff")
    assert "batch_size is 0" in refused(capfd, sparse, "--prompt", "a", "--batch-size", "0")
    assert "sparsify_" in refused(capfd, files / "llama", "--prompt", "a", "--backend", "reference")
    assert "backend 'triton' cannot run here" in refused(capfd, sparse, "--prompt", "a", "--backend", "triton")
    assert "nonsense" in refused(capfd, sparse, "--prompt", "a", "--backend", "nonsense")


def test_more_than_the_models_positions_is_refused(sparse, capfd):
    said = refused(capfd, sparse, "--prompt", "1 and 2", "--max-new-tokens", "250")
    assert "and --max-new-tokens 250 are beyond the model's 256 positions" in said
