"""The page's client: one question to an OpenAI-compatible server, and its answer as it grows."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import httpx

# Seconds: to reach a server on this machine, and between two tokens, which a full server may take long for.
REACH, SILENCE = 5.0, 300.0
# Servers on this machine: no proxy is asked, and the certificates of others are not read, which takes longer than a request.
LOCAL: dict[str, Any] = {"trust_env": False, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}
# Of a streamed answer: the line that ends it, and what stands before the others.
DONE, DATA = "[DONE]", b"data:"


@dataclass(frozen=True)
class Server:
    """Where a model answers.

    Args:
        title: what sentences call it.
        url: without `/v1`.
        model: the name that requests give.
        longest: the most tokens of prompt and answer together.
        key: of `--api-key`; None: none is asked for.
    """

    title: str
    url: str
    model: str
    longest: int
    key: str | None = None


@dataclass(frozen=True)
class Answer:
    """As much of an answer as has come.

    Args:
        text, tokens: what has come, and how many tokens that is.
        first: seconds until the first token.
        rate: tokens per second since then; None: too few to tell.
        finish: why the server ended it ("stop", "length"); None: it goes on.
        error: a sentence, where there will be no more.
    """

    text: str = ""
    tokens: int = 0
    first: float | None = None
    rate: float | None = None
    finish: str | None = None
    error: str | None = None


def headers(key: str | None) -> dict[str, str]:
    """What a request says beside its body."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def stream_answer(server: Server, prompt: str, most: int, temperature: float) -> AsyncGenerator[Answer, None]:
    """The answer to a prompt, each time that more of it has come; what goes wrong is the last one's `error`.

    Args:
        server: who is asked.
        prompt: as it reads it.
        most: the most new tokens.
        temperature: 0: the most likely token each time.
    """
    answer = Answer()
    try:
        # Closed with this: the server is to take no step for an answer that nobody reads.
        async with aclosing(_streamed(server, prompt, most, temperature)) as stream:
            async for answer in stream:
                yield answer
        if answer.finish is None:
            yield replace(answer, error=f"{server.title}: the answer ended before its end; ask again")
    except _Refused as error:
        yield replace(answer, error=str(error))
    except ValueError:
        yield replace(answer, error=f"{server.title}: what came from {server.url} is no stream of completions")
    except (httpx.ConnectError, httpx.ConnectTimeout):
        yield replace(answer, error=f"{server.title}: no server answers at {server.url}; it has ended, or starts again")
    except httpx.TimeoutException:
        yield replace(answer, error=f"{server.title}: nothing came for {SILENCE:.0f} s; ask again, or for less")
    except httpx.TransportError:
        yield replace(answer, error=f"{server.title}: the connection broke in the middle of the answer; ask again")


class _Refused(Exception):
    """The server says no; the message is the sentence to show."""


async def _streamed(server: Server, prompt: str, most: int, temperature: float) -> AsyncGenerator[Answer, None]:
    body = {"model": server.model, "prompt": prompt, "max_tokens": most, "temperature": temperature, "stream": True}
    # Of vLLM: the number of tokens with each piece, as a piece may be several.
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    begun, answer, first, counted = time.perf_counter(), Answer(), 0.0, 0
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(SILENCE, connect=REACH), **LOCAL) as http,
        http.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers(server.key)) as response,
    ):
        if response.status_code != httpx.codes.OK:
            await response.aread()
            raise _Refused(_sentence(response.content, server, response.status_code))
        async for event in _events(response):
            if "error" in event:
                raise _Refused(_sentence(json.dumps(event).encode(), server, httpx.codes.OK))
            usage = event.get("usage") or {}
            for choice in event.get("choices") or ():
                now, piece = time.perf_counter(), choice.get("text") or ""
                tokens = usage.get("completion_tokens", answer.tokens + bool(piece))
                if answer.first is None and tokens:
                    first, counted = now, tokens
                    answer = replace(answer, first=now - begun)
                rate = (tokens - counted) / (now - first) if tokens > counted else None
                finish = choice.get("finish_reason") or answer.finish
                answer = replace(answer, text=answer.text + piece, tokens=tokens, rate=rate, finish=finish)
                yield answer


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event. Lines end at line feeds alone: what httpx takes for other line ends may stand in an answer."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            text = line.removeprefix(DATA).strip().decode()
            if line.startswith(DATA) and text == DONE:
                return
            if line.startswith(DATA):
                yield json.loads(text)


def _sentence(body: bytes, server: Server, status: int) -> str:
    """The server's own message in a refusal."""
    try:
        said = json.loads(body)
        said = said.get("error", said) if isinstance(said, dict) else said
        said = said.get("message") or said.get("detail") if isinstance(said, dict) else said
    except ValueError:
        said = None
    return said if isinstance(said, str) and said else f"{server.title}: the server refuses, with status {status}"
