"""`layalign serve`: OpenAI's two forms of asking, streaming, errors in words, and answers that are those of `model.generate`."""

import json
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.conftest import QUESTIONS, generated

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

ROOT = Path(__file__).parents[2]
NEW = 16


class Client:
    """Asks a server in JSON."""

    def __init__(self, url):
        self.url = url

    def send(self, path, body=None):
        """-> (status, bytes)."""
        data = None if body is None else json.dumps(body).encode() if not isinstance(body, bytes) else body
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def complete(self, prompt, **given):
        body = {"model": "layalign", "prompt": prompt, "max_tokens": NEW, "temperature": 0} | given
        return self.send("/v1/completions", body)

    def chat(self, *messages, **given):
        body = {"model": "layalign", "messages": list(messages), "max_tokens": NEW, "temperature": 0} | given
        return self.send("/v1/chat/completions", body)


@pytest.fixture(scope="module")
def client(model_folder, tmp_path_factory):
    """Of a server that runs."""
    from layalign.serving.page.processes import running

    options = ["--served-model-name", "layalign", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"]
    options += ["--trust-request-mm-kwargs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        command = [sys.executable, "-m", "layalign", "serve", model_folder, *options]
        with running("the server", command, tmp_path_factory.mktemp("server") / "log.txt") as url:
            yield Client(url)


@pytest.fixture(scope="module")
def texts(model_folder):
    """What `model.generate` answers to QUESTIONS, as text that goes on after the prompt: vLLM drops no space that it begins with."""
    from layalign import LayAlignProcessor

    processor = LayAlignProcessor.from_pretrained(model_folder)
    rows = generated(model_folder, QUESTIONS, NEW)
    return [" " + processor.decode(row, skip_special_tokens=True) for row in rows]


def text_of(answer):
    status, body = answer
    assert status == 200, body
    (choice,) = json.loads(body)["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def user(content):
    return {"role": "user", "content": content}


def test_completions(client, texts):
    status, body = client.complete(QUESTIONS)
    assert status == 200
    assert [choice["text"] for choice in json.loads(body)["choices"]] == texts


def test_chat_of_many_at_once(client, texts):
    """Several languages in one batch."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda text: text_of(client.chat(user(text))), QUESTIONS * 4))
    assert found == texts * 4


def test_chat_in_parts(client, texts):
    assert text_of(client.chat(user([{"type": "text", "text": QUESTIONS[0]}]))) == texts[0]


@pytest.mark.parametrize("form", ["completions", "chat"])
def test_streams(client, texts, form):
    def pieces(**given):
        ask = client.complete if form == "completions" else lambda text, **said: client.chat(user(text), **said)
        status, body = ask(QUESTIONS[2], stream=True, **given)
        assert status == 200
        events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        found = (choice["text"] if form == "completions" else choice["delta"].get("content") for choice in choices)
        return [piece for piece in found if piece]

    assert "".join(pieces()) == texts[2]
    # A server that is kept waiting sends what has come meanwhile as one: nine tokens were two pieces on a busy machine.
    assert len(pieces(max_tokens=96, ignore_eos=True)) > 4


def test_echo(client, texts):
    assert text_of(client.complete(QUESTIONS[0], echo=True)) == QUESTIONS[0] + texts[0]


def test_logprobs_and_samples(client):
    status, body = client.complete(QUESTIONS[0], n=3, temperature=1.0, logprobs=2, seed=1)
    assert status == 200
    choices = json.loads(body)["choices"]
    assert len(choices) == 3 and all(choice["logprobs"]["token_logprobs"] for choice in choices)


def test_beams(client):
    """Each step of a beam is a request of its own, which belongs to the question."""
    status, body = client.complete(QUESTIONS[0], use_beam_search=True, n=2, max_tokens=6)
    assert status == 200, body
    assert len({choice["text"] for choice in json.loads(body)["choices"]}) == 2


def test_how_a_question_is_read(client, model_folder):
    """As the request says, where the server was told to trust requests."""
    from layalign import LayAlignProcessor

    (cut,) = generated(model_folder, QUESTIONS[:1], NEW, encoder_max_length=5)
    found = text_of(client.chat(user(QUESTIONS[0]), mm_processor_kwargs={"encoder_max_length": 5}))
    processor = LayAlignProcessor.from_pretrained(model_folder)
    assert found == " " + processor.decode(cut, skip_special_tokens=True)
    assert found != text_of(client.chat(user(QUESTIONS[0])))
    status, body = client.chat(user(QUESTIONS[0]), mm_processor_kwargs={"language": "sw"})
    assert status == 400 and "got language" in json.loads(body)["error"]["message"]


REFUSED = {
    "system": ([{"role": "system", "content": "Be brief."}, user("2 + 5?")], "a system message has no place"),
    "turns": ([user("2 + 5?"), {"role": "assistant", "content": "7"}, user("8 na 8?")], "one message of the user"),
    "assistant": ([{"role": "assistant", "content": "7"}], "one message of the user"),
    "picture": ([user([{"type": "image_url", "image_url": {"url": "data:,"}}])], "must be text"),
    "empty": ([user("  ")], "the question is empty"),
    "long": ([user("na " * 2000)], "tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_conversations(client, case):
    messages, said = REFUSED[case]
    status, body = client.chat(*messages)
    assert status == 400, body
    assert said in json.loads(body)["error"]["message"]


def test_refused_prompts(client):
    for prompt, said in (([1, 2, 3], "takes a text"), (" ", "the question is empty"), ("na " * 2000, "tokens")):
        status, body = client.complete(prompt)
        assert status == 400, (prompt, body)
        assert said in json.loads(body)["error"]["message"], prompt
    status, body = client.chat(user("2 + 5?"), kv_transfer_params={"prompt_token_ids": [1, 2, 3]})
    assert status == 400 and "takes a text" in json.loads(body)["error"]["message"]
    status, body = client.complete("2 + 5?", truncate_prompt_tokens=2)
    assert status == 400 and "truncate_prompt_tokens" in json.loads(body)["error"]["message"]


def test_requests_without_a_question_are_refused(client, texts):
    """vLLM makes such of its own for `/generative_scoring`, past the renderer."""
    scored = {"model": "layalign", "query": [1, 5], "items": [[6, 7], [8]], "label_token_ids": [4, 5]}

    def ask(place):
        if place % 2:
            return client.send("/generative_scoring", scored)
        return text_of(client.complete(QUESTIONS[place // 2 % len(QUESTIONS)]))

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(64)))
    assert found[::2] == texts * 4
    for status, body in found[1::2]:
        assert status == 400 and "takes a text" in json.loads(body)["error"]["message"]


def test_malformed_requests_and_clients_that_hang_up_change_nothing(client, texts):
    bodies = [
        b"",
        b"{",
        b"[]",
        b'{"prompt": 3}',
        b'{"model": "other", "prompt": "a"}',
        b'{"prompt": [[]]}',
        b"\xff\xfe",
    ]
    for path in ("/v1/completions", "/v1/chat/completions"):
        for body in bodies * 15:
            status, _ = client.send(path, body)
            assert 400 <= status < 500
    port = int(client.url.rpartition(":")[2])
    body = json.dumps(
        {"model": "layalign", "prompt": QUESTIONS[0], "max_tokens": 400, "min_tokens": 400, "stream": True}
    )
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            connection.recv(64)
    assert client.send("/health")[0] == 200
    assert text_of(client.complete(QUESTIONS[0])) == texts[0]
    # What they held is given back.
    assert_nothing_is_held(client)


def test_flood(client, texts):
    """500 requests, 64 clients at a time, twice as many as the server works on."""
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda place: client.complete(QUESTIONS[place % len(QUESTIONS)]), range(500)))
    assert [text_of(answer) for answer in found] == [texts[place % len(texts)] for place in range(500)]
    assert client.send("/health")[0] == 200
    assert_nothing_is_held(client)


def assert_nothing_is_held(client):
    ends = time.monotonic() + 30
    while (used := used_cache(client)) > 0 and time.monotonic() < ends:
        time.sleep(0.5)
    assert used == 0


def used_cache(client):
    """Share of the cache's blocks that are in use, by the server's metrics, which lag a step behind."""
    text_of(client.complete("7"))
    lines = client.send("/metrics")[1].decode().splitlines()
    (line,) = [line for line in lines if line.startswith("vllm:kv_cache_usage_perc{")]
    return float(line.split()[-1])
