"""A vLLM engine in a process of its own: ``python engine.py CASE``, a JSON file. It prints one JSON line.

A case has ``engine`` (keywords of ``vllm.LLM``), ``prompts`` (lists of token ids) and ``lengths`` (new tokens of each
prompt where requests end at different steps).
"""

import json
import sys
from pathlib import Path

from looking import look, sizes


def main(path: str) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    case = json.loads(Path(path).read_text())
    prompts, lengths, most = case["prompts"], case["lengths"], max(case["lengths"])
    engine = LLM(**case["engine"])

    def run(prompts, lengths, logprobs=None):
        options = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=logprobs) for n in lengths]
        made = engine.generate([TokensPrompt(prompt_token_ids=one) for one in prompts], options, use_tqdm=False)
        return [one.outputs[0] for one in made]

    def tokens(outputs):
        return [list(one.token_ids) for one in outputs]

    found = {"layers": engine.apply_model(look)}
    alone = [run([one], [most])[0] for one in prompts]
    found["alone"] = tokens(alone)
    found["batch"] = tokens(run(prompts, [most] * len(prompts)))
    found["staggered"] = tokens(run(prompts * 2, lengths * 2))
    found["sizes"] = engine.apply_model(sizes)
    if case.get("logprobs"):
        outputs = run(prompts, [most] * len(prompts), logprobs=1)
        found["logprobs"] = [
            [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)] for one in outputs
        ]
        found["chosen"] = tokens(outputs)
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
