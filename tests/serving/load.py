"""Many requests of unequal length at a server, all at once: which came back, and which were wrong.

``python load.py URL MODEL EXPECTED --clients 64 --requests 2000``. EXPECTED is a JSON file of ``prompts`` (lists of
token ids) and ``tokens``, the longest greedy continuation of each.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp


async def run(url: str, model: str, expected: dict[str, Any], clients: int, requests: int) -> dict[str, Any]:
    """Each client sends its next request when it has the answer to its last. Half of all requests are streamed."""
    chance, outcomes, seconds = random.Random(1), Counter[str](), list[float]()
    waiting = iter([(chance.randrange(len(expected["prompts"])), chance.random()) for _ in range(requests)])

    async def client(session: aiohttp.ClientSession) -> None:
        for which, share in waiting:
            whole = expected["tokens"][which]
            new = 1 + int(share * (len(whole) - 1))
            body = {"model": model, "prompt": expected["prompts"][which], "max_tokens": new, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True, "stream": which % 2 == 0}
            started = time.perf_counter()
            try:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    outcomes["right" if _tokens(await answer.text()) == whole[:new] else "wrong"] += 1
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
                outcomes["lost"] += 1
            seconds.append(time.perf_counter() - started)

    limit = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    seconds.sort()
    return {**outcomes, "median_s": seconds[len(seconds) // 2], "longest_s": seconds[-1]}


def _tokens(answer: str) -> list[int]:
    """The new tokens of an answer, whole or streamed as lines ``data: {...}``."""
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line.strip() and "[DONE]" not in line]
    return [token for line in lines for token in json.loads(line)["choices"][0]["token_ids"] or []]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    expected = json.loads(given.expected.read_text())
    print(json.dumps(asyncio.run(run(given.url, given.model, expected, given.clients, given.requests))))


if __name__ == "__main__":
    main()
