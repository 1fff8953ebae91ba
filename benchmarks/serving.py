"""Tokens a second and time to first token of `kan serve`: one request at a time against several, from OpenAI's client.

    python benchmarks/serving.py                       # needs a run: make train
    python benchmarks/serving.py --run first.safetensors --concurrent 1 4 16 --tokens 256
"""

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import openai
from common import write_result

PROMPT = "def main(arguments):\n    for number in range(10):\n        print(number)\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="kan_tiny", help="name or path of a run, or an exported file")
    parser.add_argument("--root", default="runs", help="folder of run directories")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 16], help="requests under way at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a request")
    parser.add_argument("--rounds", type=int, default=5, help="batches of requests that are timed, after one that is not")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, in the server")
    arguments = parser.parse_args()
    process, url = _serve(arguments)
    try:
        rows = [asyncio.run(_measured(url, arguments, concurrent)) for concurrent in arguments.concurrent]
    finally:
        process.terminate()
        process.wait()
    for row in rows:
        row["against_one"] = round(row["median_tokens_per_second"] / rows[0]["median_tokens_per_second"], 2)
        print(
            f"{row['concurrent']:3d} at a time: {row['median_tokens_per_second']:8.1f} tokens/s, {row['against_one']:.2f} times the first row; "
            f"first token after {1000 * row['median_first_token_seconds']:.0f} ms, all after {row['median_seconds']:.2f} s"
        )
    write_result("serving", claim="requests that are decoded together cost less than one after the other", config=vars(arguments), rows=rows)


def _serve(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    settings = [f"run={arguments.run}", f"root={arguments.root}", f"dtype={arguments.dtype}", "port=0", "name=measured"]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-m", "kan_train", "serve", *settings, f"max_tokens={arguments.tokens}", f"max_rows={max(arguments.concurrent)}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    greeting = process.stderr.readline()
    found = re.search(r"http://\S+$", greeting)
    if not found:
        raise SystemExit(greeting + process.stderr.read())
    return process, found[0]


async def _measured(url: str, arguments: argparse.Namespace, concurrent: int) -> dict[str, Any]:
    """One row: batches of `concurrent` requests that start together, each with a prompt and a seed of its own."""
    speeds, seconds, firsts, given = [], [], [], 0
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        for number in range(arguments.rounds + 1):
            started = time.perf_counter()
            answers = await asyncio.gather(*(_one(client, arguments.tokens, 1000 * number + each) for each in range(concurrent)))
            elapsed, tokens = time.perf_counter() - started, sum(tokens for tokens, _ in answers)
            if number:
                speeds.append(tokens / elapsed)
                seconds.append(elapsed)
                firsts += [first for _, first in answers]
                given += tokens
    return {
        "name": f"{concurrent} at a time", "concurrent": concurrent, "tokens": given, "median_tokens_per_second": statistics.median(speeds),
        "tokens_per_second": speeds, "median_seconds": statistics.median(seconds), "median_first_token_seconds": statistics.median(firsts),
        "longest_first_token_seconds": max(firsts),
    }  # fmt: skip


async def _one(client: openai.AsyncOpenAI, max_tokens: int, seed: int) -> tuple[int, float]:
    """(tokens given, seconds to the first text)."""
    started, first, tokens = time.perf_counter(), 0.0, 0
    stream = await client.completions.create(
        model="measured", prompt=f"# {seed}\n{PROMPT}", max_tokens=max_tokens, temperature=1.0, seed=seed, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        first = first or time.perf_counter() - started
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return tokens, first


if __name__ == "__main__":
    main()
