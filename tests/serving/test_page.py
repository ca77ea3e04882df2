"""The page of `layalign serve MODEL --ui`: what its client makes of streams and errors, and the life of the servers below it. Needs no
vLLM: a stub answers in its place."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("httpx", reason="httpx is not installed (layalign[ui])")

from layalign import LayAlignConfig
from layalign.cli import app
from layalign.serving import server, settings
from layalign.serving.page import asking, launch, processes, view
from layalign.serving.page.asking import Answer, Server, stream_answer
from layalign.serving.page.processes import free_port
from tests.serving.stub_server import REFUSAL, SEPARATORS, Stub

STUB = Path(__file__).parent / "stub_server.py"


@pytest.fixture
def stub():
    with Stub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """What is started in place of a Python with vLLM."""
    path = tmp_path_factory.mktemp("python") / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{STUB}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def server_of(stub, **given):
    return Server(**{"title": "LayAlign", "url": stub.url, "model": "m", "longest": 512} | given)


def answers(server, prompt, most=64, temperature=0.0):
    async def collected():
        return [answer async for answer in stream_answer(server, prompt, most, temperature)]

    return asyncio.run(collected())


def test_answers_grow(stub, monkeypatch):
    # Which is not asked for what is on this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = answers(server_of(stub), "Wie viel ist 2 + 5?", temperature=0.5)
    texts = [answer.text for answer in found]
    assert len(set(texts)) > 5 and all(later.startswith(text) for text, later in pairwise(texts))
    assert texts[-1] == "layalign hears: Wie viel ist 2 + 5?"
    # Two tokens a piece, as the server counts; the pace is that of those after the first piece.
    assert [answer.tokens for answer in found] == [2 * n for n in range(1, len(found) + 1)]
    assert found[0].rate is None and found[0].first > 0
    gained, waited = found[-1].tokens - found[0].tokens, stub.pause * (len(found) - 1)
    # A first piece that a busy machine reads late leaves the others less time: 216 a second were once read of a server that gives 200.
    assert 0 < found[-1].rate < gained / max(waited - found[0].first, 1e-9)
    assert [answer.finish for answer in found] == [None] * (len(found) - 1) + ["stop"]
    (body,) = stub.bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 64, 0.5)
    assert answers(server_of(stub), "a b c", most=3)[-1].finish == "length"


def test_line_ends_of_unicode_are_text(stub):
    assert answers(server_of(stub), "separators")[-1].text == SEPARATORS


ERRORS = {
    "this is long": REFUSAL,
    "a status": "LayAlign: the server refuses, with status 500",
    "it breaks there": "LayAlign: the connection broke in the middle of the answer; ask again",
    "it stumbles there": "the engine is dead",
    "it babbles there": "LayAlign: what came from URL is no stream of completions",
}


@pytest.mark.parametrize("prompt", ERRORS)
def test_what_goes_wrong_is_a_sentence(stub, prompt):
    last = answers(server_of(stub), prompt)[-1]
    said = ERRORS[prompt].replace("URL", stub.url)
    assert last.error == said
    # What had come before stays.
    assert last.text == ("layalign hears:" if "there" in prompt else "")
    assert said.replace("'", "&#x27;") in view.noted(last)


def test_a_key_is_sent(stub):
    stub.key = "sesame"
    assert answers(server_of(stub), "2 + 5?")[-1].error == "Unauthorized"
    assert answers(server_of(stub, key="sesame"), "2 + 5?")[-1].error is None


def test_no_server():
    gone = Server("LayAlign", f"http://127.0.0.1:{free_port()}", "m", 512)
    (last,) = answers(gone, "2 + 5?")
    assert last.error == f"LayAlign: no server answers at {gone.url}; it has ended, or starts again"


def test_silence_ends(stub, monkeypatch):
    stub.pause = 2
    monkeypatch.setattr(asking, "SILENCE", 0.1)
    last = answers(server_of(stub), "2 + 5?")[-1]
    assert last.error.startswith("LayAlign: nothing came for")
    assert last.text == "layalign"


def test_who_stops_asking_hangs_up(stub):
    """So that the server takes no step for an answer that nobody reads."""

    async def look_at_one():
        stream = stream_answer(server_of(stub), "forever", 10**6, 0.0)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(look_at_one())
    assert stub.hung_up.acquire(timeout=10)


def test_notes():
    assert view.noted(Answer(tokens=1, first=0.25)) == '<div role="status">1 token · first after 0.25 s</div>'
    said = view.noted(Answer("a", 9, 0.5, 12.34, "length", "<b>"))
    assert "9 tokens · 12.3 tokens/s · first after 0.50 s · cut at the most new tokens" in said
    assert '<div role="alert">&lt;b&gt;</div>' in said


def asked(sides, question, frames=10**6):
    """What is shown of the answers of sides, (text, note) of each, up to so many pictures."""

    async def collected():
        stream, found = view.asking(sides)(question, 64, 0.0), []
        async for shown in stream:
            found.append([shown[place : place + 2] for place in range(0, len(shown), 2)])
            if len(found) == frames:
                break
        await stream.aclose()
        return found

    return asyncio.run(collected())


def test_what_a_side_asks(stub):
    """An empty question goes to nobody: the LLM alone would answer its template."""

    def names_the_language(question):
        raise ValueError("prompt: it names the language")

    sides = [view.Side("a", server_of(stub), "<{}>".format), view.Side("b", server_of(stub), names_the_language)]
    assert all("Write a question first." in note for _, note in asked(sides, "  ")[-1])
    assert stub.bodies == []
    (text, note), (nothing, why) = asked(sides, "2 + 5?")[-1]
    assert text == "layalign hears: <2 + 5?>" and "alert" not in note
    assert nothing == "" and "prompt: it names the language" in why


def test_sides_answer_at_the_same_time(stub, monkeypatch):
    monkeypatch.setattr(view, "FRAME", 0.005)
    sides = [view.Side("a", server_of(stub), str), view.Side("b", server_of(stub), str)]
    whole = "layalign hears: one two three four five six seven eight"
    pictures = asked(sides, "one two three four five six seven eight")
    assert any(all(0 < len(text) < len(whole) for text, _ in picture) for picture in pictures)
    assert [text for text, _ in pictures[-1]] == [whole] * 2


def test_a_reader_who_leaves_ends_both(stub):
    asked([view.Side("a", server_of(stub), str)] * 2, "forever", frames=2)
    assert stub.hung_up.acquire(timeout=10) and stub.hung_up.acquire(timeout=10)


def test_what_the_llm_alone_is_asked(model_folder, tmp_path):
    assert launch.llm_prompt(model_folder)("2 + 5?") == "2 + 5?\nAnswer:"
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LayAlignProcessor"}')
    assert launch.llm_prompt(str(tmp_path))("2 + 5?") == "2 + 5?"


def test_the_llm_alone_is_the_model_s(model_folder, tmp_path, monkeypatch):
    config = LayAlignConfig.from_pretrained(model_folder)
    given = ["--dtype", "float32", "--host", "0.0.0.0"]
    llm, *words = launch.llm_words(model_folder, config, given)
    assert (Path(llm) / "config.json").is_file() and llm.endswith("bases/tiny_llm")
    # Later words win: it is reached from this machine alone.
    assert words == [*given, "--host", "127.0.0.1", "--served-model-name", "llm"]
    config.llm_name_or_path, config.base_sources = "some/llm", {"llm": {"revision": "abc"}}
    assert launch.llm_words(model_folder, config, [])[-2:] == ["--revision", "abc"]
    # The model's own revision is not its LLM's.
    config.base_sources = {}
    assert launch.llm_words(model_folder, config, ["--revision=v2"])[-2:] == ["--revision", "main"]
    # A trained LLM is saved with the model, without its tokenizer.
    config.train_llm = True
    (tmp_path / "llm").mkdir()
    llm, *words = launch.llm_words(str(tmp_path), config, [])
    assert llm == str(tmp_path / "llm") and words[-2:] == ["--tokenizer", str(tmp_path)]
    # Of a model on the hub the part with its LLM is fetched, of the same revision.
    asked = []
    monkeypatch.setattr(
        settings, "snapshot_download", lambda *given, **how: asked.append((given, how)) or str(tmp_path)
    )
    llm, *words = launch.llm_words("some/model", config, ["--revision", "v1", "--revision", "v2"])
    assert llm == str(tmp_path / "llm") and words[-4:] == ["--tokenizer", "some/model", "--tokenizer-revision", "v2"]
    assert asked == [(("some/model",), {"revision": "v2", "allow_patterns": ["llm/*"]})]


def test_the_config_is_that_of_the_revision(monkeypatch):
    """Of `layalign serve`, with the page and without."""
    asked = []

    def config(*given, **how):
        asked.append((given, how))
        raise ValueError("far enough")

    monkeypatch.setattr(LayAlignConfig, "from_pretrained", config)
    for serving in (server.serve, launch.serve_with_page):
        with pytest.raises(ValueError, match="far enough"):
            serving("some/model", ["--port", "80", "--revision", "v2"])
        with pytest.raises(ValueError, match="--revision"):
            serving("some/model", ["--revision"])
    assert asked == [(("some/model",), {"revision": "v2"})] * 2


def test_options_that_do_not_go_together(model_folder):
    for words, said in (
        (["--uds", "socket"], "--uds goes without --ui"),
        (["--ssl_keyfile=key"], "--ssl-keyfile goes without --ui"),
        (["--port", "high"], "--port"),
    ):
        with pytest.raises(ValueError, match=said):
            launch.serve_with_page(model_folder, words)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port: 127.0.0.1:{port} cannot be had"):
            launch.serve_with_page(model_folder, ["--port", str(port), "--host", "127.0.0.1"])
        with pytest.raises(ValueError, match="--ui-port"):
            launch.serve_with_page(model_folder, ["--port", str(free_port())], port=port)
    for words in (["--ui-port", "7000"], ["--vllm-python", "python"]):
        with pytest.raises(ValueError, match="goes with --ui"):
            CliRunner().invoke(app, ["serve", model_folder, *words], catch_exceptions=False)


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    """Where logs are, while there are any."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda: list(tmp_path.glob("layalign-serve-*/*.log"))


def serve(model_folder, python, *words, hear=lambda words: None):
    """What is said, which `hear` is told at once; afterwards no server is there."""
    said, port = [], free_port()

    def say(words):
        said.append(words)
        hear(words)

    try:
        given = ["--port", str(port), *words]
        launch.serve_with_page(model_folder, given, port=free_port(), python=python, say=say)
    finally:
        with pytest.raises(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
    return said


@pytest.mark.parametrize("kind", ["layalign", "llm"])
def test_a_server_that_dies_ends_the_other(model_folder, python, logs, kind):
    with pytest.raises(processes.ServerEnded) as raised:
        serve(model_folder, python, f"--dies-{kind}")
    title = {"layalign": "LayAlign", "llm": "the LLM alone"}[kind]
    assert str(raised.value).startswith(f"{title} ended with status 3; the last lines of ")
    assert str(raised.value).endswith("\n  no memory is left")
    # Both share a device's memory.
    assert logs() and all("--gpu-memory-utilization 0.45" in log.read_text() for log in logs())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_end_while_it_starts(model_folder, python, logs, number, monkeypatch):
    """While it says how that goes, in the server's own words."""
    monkeypatch.setattr(processes, "WORD", 0.2)

    heard = []

    def hear(words):
        heard.append(re.match(r"the LLM alone has been starting for \d+ s; it says: starting -m", words))
        if heard[-1]:
            os.kill(os.getpid(), number)

    late = threading.Timer(60, os.kill, (os.getpid(), number))
    late.start()
    said = serve(model_folder, python, "--hangs-llm", "--gpu-memory-utilization", "0.3", hear=hear)
    late.cancel()
    assert any(heard)
    assert any(words.startswith("LayAlign is ready after") for words in said)
    assert said[-1].startswith("ending the servers")
    assert not logs()


@pytest.mark.parametrize("way", ["in time", "told again"])
def test_a_server_that_will_not_end_is_killed(tmp_path, monkeypatch, way):
    """And what it started with it."""
    code = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)\n"
    code += f"subprocess.run([sys.executable, '-S', '{STUB}', 'llm', '--hangs-llm', '--port', '1'])"
    command = [sys.executable, "-S", "-c", code]
    server = processes.ServerProcess("it", command, tmp_path / "log", "http://127.0.0.1:1")
    until(lambda: server.last_line().startswith("starting"))
    told = processes.Told()
    if way == "in time":
        monkeypatch.setattr(processes, "GRACE", 0.5)
    else:
        threading.Timer(0.5, setattr, (told, "times", 1)).start()
    begun = time.monotonic()
    processes.end_all([server], told)
    assert 0.4 < time.monotonic() - begun < 10
    until(lambda: server.ended() and not group_is_there(server._process.pid))


def until(holds):
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.05)


def group_is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_ends_with_its_page(tmp_path):
    """Also where the page was ended by SIGKILL."""
    code = "import os, time; from layalign.serving.page import child; child.LOOK = 0.05; child.end_with(os.getppid())\n"
    code += f"open({str(tmp_path / 'begun')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    page = subprocess.Popen([sys.executable, "-c", outer], cwd=Path(__file__).parents[2], start_new_session=True)
    begun = tmp_path / "begun"
    until(lambda: begun.exists() and begun.read_text())
    page.kill()
    page.wait()
    until(lambda: not group_is_there(page.pid))
