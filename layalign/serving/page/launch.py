"""`layalign serve MODEL --ui`: two servers, and the page that asks both, until told to end."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from layalign.configuration import LayAlignConfig
from layalign.loading import check_model_path
from layalign.processor import LayAlignProcessor
from layalign.prompts import fill_prompt
from layalign.serving.page.asking import LOCAL, Server, headers
from layalign.serving.page.processes import (
    LOOK,
    LOOPBACK,
    ServerEnded,
    ServerProcess,
    Told,
    end_all,
    free_port,
    wait_until_ready,
    watch,
)
from layalign.serving.page.view import Side, build_app
from layalign.serving.settings import check_served, given_revision, llm_place

PORT, UI_PORT = 8000, 7860
# Where a server listens on all addresses.
ANYWHERE = (None, "", "0.0.0.0", "::")  # noqa: S104
# Of a device's memory, which both servers share, unless --gpu-memory-utilization says otherwise.
SHARE = "0.45"
# What a folder holds that has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Of vLLM's options those that leave the page no way to its servers.
REFUSED = ("--uds", "--headless", "--ssl-keyfile", "--ssl-certfile")


def serve_with_page(
    model: str,
    arguments: Sequence[str] = (),
    *,
    port: int = UI_PORT,
    python: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a model and its LLM alone, each by vLLM, and a web page that asks both.

    Args:
        model: folder or hub name.
        arguments: of `vllm serve`, for both servers; `--port` is LayAlign's.
        port: the page's.
        python: the Python that has vLLM; None: this one.
        say: takes words on how it goes.

    Raises:
        ValueError: no model there, one that cannot be served, options that go without the page, or a port that is taken.
        ServerEnded: a server ended before it was told to.
    """
    check_model_path(model)
    revision = given_revision(arguments)
    config = LayAlignConfig.from_pretrained(model, revision=revision)
    check_served(config)
    options = _read(arguments)
    host = options.host if options.host not in ANYWHERE else LOOPBACK
    for name, place, number in (("--port", host, options.port), ("--ui-port", options.host or LOOPBACK, port)):
        _check_free(name, place, number)
    shared = [] if options.gpu_memory_utilization else ["--gpu-memory-utilization", SHARE]
    child = [python or sys.executable, "-m", "layalign.serving.page.child"]
    logs = Path(tempfile.mkdtemp(prefix="layalign-serve-"))
    say(f"starting LayAlign's server on port {options.port}, then its LLM's alone; their logs are in {logs}")
    servers: list[ServerProcess] = []
    told = Told()

    def go_on() -> bool:
        watch(servers)
        return not told.times

    def start(title: str, name: str, place: str, number: int, words: Sequence[str]) -> Server | None:
        url = _url(place, number)
        server = ServerProcess(title, [*child, *words, "--port", str(number)], logs / f"{name}.log", url)
        servers.append(server)
        wait_until_ready(server, servers[:-1], told, say)
        return None if told.times else _found(title, url, options.api_key)

    with told.listening():
        try:
            # One after the other: vLLM measures what memory there is while it starts.
            own = start("LayAlign", "layalign", host, options.port, ["layalign", model, *arguments, *shared])
            words = ["llm", *llm_words(model, config, arguments), *shared]
            alone = own and start("the LLM alone", "llm", LOOPBACK, free_port(), words)
            if own and alone:
                sides = (
                    Side("LayAlign", own, lambda question: question),
                    Side("The LLM alone", alone, llm_prompt(model, revision)),
                )
                _show(sides, own.model, options.host or LOOPBACK, port, go_on, say)
        finally:
            if told.times:
                with suppress(OSError):  # the terminal may be what has gone
                    say("ending the servers; once more ends them at once")
            end_all(servers, told)
    shutil.rmtree(logs)


def llm_words(model: str, config: LayAlignConfig, arguments: Sequence[str]) -> list[str]:
    """A server of the LLM that a model joins: its folder or hub name, and options of `vllm serve`.

    Args:
        model: the model's own folder or hub name.
        config: its settings.
        arguments: of its own server, which are the LLM's server's too, unless they are about LayAlign's name and place.
    """
    own = given_revision(arguments)
    llm, revision = llm_place(model, config, own)
    # Of an option that is given twice vLLM takes the last.
    words = [llm, *arguments, "--host", LOOPBACK, "--served-model-name", "llm"]
    if revision or own:
        words += ["--revision", revision or "main"]
    folder = Path(llm)
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        words += ["--tokenizer", model, *(["--tokenizer-revision", own] if own else [])]
    return words


def llm_prompt(model: str, revision: str | None = None) -> Callable[[str], str]:
    """What makes of a question the text that the model's LLM reads beside the soft prompts; without a template, the question.

    Args:
        model: folder or hub name.
        revision: of the latter.
    """
    settings, _ = LayAlignProcessor.get_processor_dict(model, revision=revision)
    template = settings.get("prompt_template")
    return (lambda question: question) if template is None else (lambda question: fill_prompt(template, question))


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    """Of vLLM's options what the page must know."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--host")
    parser.add_argument("--api-key", "--api_key", nargs="*")
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization")
    words = [word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")]
    if wrong := [name for name in REFUSED if name in words]:
        raise ValueError(f"{', '.join(wrong)} goes without --ui: the page would not reach the server")
    try:
        return parser.parse_known_args(list(arguments))[0]
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _check_free(name: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        # As servers do: a port whose last connections are being closed is free.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"{name}: {host}:{port} cannot be had ({error}); give another") from None


def _found(title: str, url: str, keys: Sequence[str] | None) -> Server:
    """What a server that is ready says of its model."""
    key = keys[0] if keys else os.environ.get("VLLM_API_KEY")
    answer = httpx.get(f"{url}/v1/models", headers=headers(key), timeout=30, **LOCAL)
    answer.raise_for_status()
    model = answer.json()["data"][0]
    return Server(title, url, model["id"], model["max_model_len"], key)


def _show(
    sides: tuple[Side, Side], subject: str, host: str, port: int, go_on: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Serve the page as long as `go_on` says so."""
    import uvicorn

    settings = uvicorn.Config(build_app(sides, subject), host, port, log_level="warning", timeout_graceful_shutdown=2)
    page = uvicorn.Server(settings)
    thread = threading.Thread(target=page.run, name="page", daemon=True)
    thread.start()
    said = False
    try:
        while go_on():
            if not thread.is_alive():
                raise ServerEnded("the page's own server ended; why stands above")
            if page.started and not said:
                said = True
                say(f"the page: {_url(LOOPBACK if host in ANYWHERE else host, port)} (Ctrl-C ends all)")
            time.sleep(LOOK)
    finally:
        page.should_exit = True
        thread.join(5)


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
