"""Load on servers: a LayAlign model and its LLM alone, each by `vllm serve` on this machine, and `model.generate` without a server.

The client is vLLM's own (`vllm bench serve`), on loopback: so many requests as are said, at most so many at once, each with as many new
tokens. The two servers run one after the other, in turns; a figure is the median of its rounds. Both do the same work: the LLM alone gets
what LayAlign's LLM reads as text, neither shares prefixes between requests, and no question is asked twice of a server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layalign.configuration import LayAlignConfig
from layalign.kernels.files import write_json, write_text
from layalign.loading import check_model_path, load_model
from layalign.serving.page.launch import llm_prompt
from layalign.serving.page.processes import running
from layalign.serving.settings import llm_place

LAYALIGN, BARE = "layalign", "bare LLM"
# {requests at once: requests}: more would measure the same for longer.
LOADS = {1: 8, 8: 32, 32: 64, 64: 64}
BATCHES = (1, 8, 64)
# {name in the results: column}; those of vLLM's client, and the prompt tokens that the server counts, soft prompts among them
FIGURES = {
    "output_throughput": "new tokens/s",
    "median_ttft_ms": "ms to the first token",
    "median_itl_ms": "ms between tokens",
    "p99_itl_ms": "ms between tokens, 99 %",
    "mean_prompt_tokens": "prompt tokens",
}
GOALS = {"of the bare LLM, 64 at once": 0.90, "of generate one by one, 64 at once": 3.0}


def measure(
    model: str | Path, questions: Sequence[str], *, new_tokens: int = 64, rounds: int = 3, dtype: str = "float32"
) -> dict[str, Any]:
    """Throughput and waiting times of both servers and of `model.generate`.

    Args:
        model: folder of a LayAlign model.
        questions: at least as many different ones as the loads have requests (168); each server gets the same.
        new_tokens: of every answer, the end of sequence ignored.
        rounds: in which each server is started anew.
        dtype: of weights.

    Returns:
        {"servers": {name: {requests at once: {figure: median}}}, "generate": {batch size: new tokens/s}, "goals": {...}, and how it
        was measured}.

    Raises:
        ValueError: no such model, or too few questions.
        RuntimeError: a server that ends, or a request that fails.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB of each server's caches on a CPU
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    check_model_path(model)
    prompts = workload(model, questions)
    config = LayAlignConfig.from_pretrained(str(model))
    llm = llm_place(str(model), config)[0]
    served = {LAYALIGN: (str(model), "layalign"), BARE: (llm, "llm")}
    seen: dict[str, dict[int, list[dict[str, float]]]] = {name: {load: [] for load in LOADS} for name in served}
    generated: dict[int, list[float]] = {size: [] for size in BATCHES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            # Who begins changes, as a machine may be slower at one time than at another.
            for name in list(served)[:: 1 if turn % 2 == 0 else -1]:
                with running(name, _command(*served[name], name, dtype), Path(folder) / "server.log") as url:
                    for load in LOADS:
                        texts = prompts[name][load]
                        found = _client(url, name, llm, texts, load, new_tokens, Path(folder))
                        seen[name][load].append({figure: found[figure] for figure in FIGURES})
                        print(
                            f"round {turn + 1}: {name}, {load} at once: {found['output_throughput']:.1f} tokens/s",
                            flush=True,
                        )
            for size, speed in _generate(model, prompts[LAYALIGN], new_tokens, dtype).items():
                generated[size].append(speed)
                print(f"round {turn + 1}: generate, batches of {size}: {speed:.1f} tokens/s", flush=True)
    servers = {
        name: {load: {f: statistics.median(row[f] for row in rows) for f in FIGURES} for load, rows in loads.items()}
        for name, loads in seen.items()
    }
    by_generate = {size: statistics.median(speeds) for size, speeds in generated.items()}
    ratios = [
        statistics.median(
            own["output_throughput"] / bare["output_throughput"]
            for own, bare in zip(seen[LAYALIGN][64], seen[BARE][64], strict=True)
        ),
        servers[LAYALIGN][64]["output_throughput"] / by_generate[1],
    ]
    return {
        "model": Path(model).name,
        "llm": Path(llm).name,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "dtype": dtype,
        "servers": servers,
        "generate": by_generate,
        "goals": dict(zip(GOALS, ratios, strict=True)),
        "raw": {name: {str(load): rows for load, rows in loads.items()} for name, loads in seen.items()},
    }


def workload(model: str | Path, questions: Sequence[str]) -> dict[str, dict[int, list[str]]]:
    """{server: {requests at once: its prompts}}: each load has questions of its own, the same of both servers.

    Args:
        model: folder of a LayAlign model.
        questions: of several that are the same the first counts.

    Raises:
        ValueError: too few.
    """
    different, needed = list(dict.fromkeys(questions)), sum(LOADS.values())
    if len(different) < needed:
        raise ValueError(f"questions: got {len(different)} different ones, takes at least {needed}")
    own, first = {}, 0
    for load, count in LOADS.items():
        own[load] = different[first : first + count]
        first += count
    read = llm_prompt(str(model))
    return {LAYALIGN: own, BARE: {load: [read(text) for text in texts] for load, texts in own.items()}}


def _command(folder: str, kind: str, name: str, dtype: str) -> list[str]:
    """That starts a server."""
    options = f"--dtype {dtype} --enforce-eager --max-num-seqs 64 --max-model-len 1024 --no-enable-prefix-caching"
    return [
        sys.executable,
        "-m",
        "layalign.serving.page.child",
        kind,
        folder,
        *options.split(),
        "--served-model-name",
        name,
    ]


def _client(url: str, name: str, tokenizer: str, texts: Sequence[str], load: int, new: int, folder: Path) -> dict:
    """vLLM's figures of a request a text."""
    asked, count = folder / "prompts.jsonl", len(texts)
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    result = folder / "client.json"
    result.unlink(missing_ok=True)
    start = (
        "import argparse, vllm.benchmarks.serve as serve; parser = argparse.ArgumentParser(); serve.add_cli_args(parser); "
        "serve.main(parser.parse_args())"
    )
    options = (
        f"--backend openai --base-url {url} --tokenizer {tokenizer} --dataset-name custom --dataset-path {asked} "
        f"--skip-chat-template --custom-output-len {new} --ignore-eos --temperature 0 --num-prompts {count} --max-concurrency {load} "
        f"--num-warmups {min(load, 4)} --disable-tqdm --percentile-metrics ttft,itl --save-result --result-filename {result}"
    )
    command = [sys.executable, "-c", start, "--model", name, "--served-model-name", name, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not result.exists():
        raise RuntimeError(f"vLLM's client ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != count:
        raise RuntimeError(f"{name}: {found['completed']} of {count} requests were answered")
    found["mean_prompt_tokens"] = found["total_input_tokens"] / count
    return found


def _generate(model: str | Path, asked: Mapping[int, list[str]], new: int, dtype: str) -> dict[int, float]:
    """{batch size: new tokens a second} of `model.generate`, in this process, of the questions of as many requests at once."""
    import torch

    loaded, processor = load_model(model, dtype)
    speeds = {}
    for size in BATCHES:
        texts = asked[size]
        batches = [processor(texts[first : first + size]).to(loaded.device) for first in range(0, len(texts), size)]
        with torch.inference_mode():
            loaded.generate(**batches[0], max_new_tokens=2, do_sample=False)
            began = time.perf_counter()
            for batch in batches:
                loaded.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        speeds[size] = len(texts) * new / (time.perf_counter() - began)
    return speeds


def table(found: dict[str, Any]) -> str:
    """Results of `measure` as markdown."""
    lines = [
        f"{found['model']} and its LLM {found['llm']} alone, each by vLLM's server, {found['dtype']}, eager; "
        f"{found['new_tokens']} new tokens a question, medians of {found['rounds']} rounds in turns. "
        "The LLM alone is asked what LayAlign's LLM reads as text; neither server shares prefixes, and no question is asked twice of one.",
        "",
        f"| | at once | {' | '.join(FIGURES.values())} |",
        f"| --- | ---: | {' | '.join('---:' for _ in FIGURES)} |",
    ]
    for name, loads in found["servers"].items():
        for load, row in loads.items():
            lines.append(f"| {name} | {load} | {' | '.join(f'{row[figure]:.1f}' for figure in FIGURES)} |")
    for size, speed in found["generate"].items():
        lines.append(f"| `model.generate`, batches of {size} | | {speed:.1f} |{' |' * (len(FIGURES) - 1)}")
    lines += ["", "| throughput | goal | measured |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {GOALS[name]:.2f} | {ratio:.2f} |" for name, ratio in found["goals"].items()]
    return "\n".join(lines) + "\n"


def record(found: dict[str, Any], folder: str | Path) -> Path:
    """serving.json and serving.md in the results folder of this kind of machine; returns the latter's path."""
    from bench.recording import describe_machine

    about = describe_machine()
    place = Path(folder) / about["kind"]
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "serving.json", {"machine": about, **found})
    write_text(place / "serving.md", f"# Serving on {about['device']}\n\n{table(found)}")
    return place / "serving.md"
