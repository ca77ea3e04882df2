"""A server that answers as OpenAI's completions do, without a model: what it does is said by words in the prompt.

As a program it stands in for a Python with vLLM: `stub_server.py -m MODULE layalign|llm MODEL --port N ...`.
"""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

REFUSAL = "prompt: the question has 99 tokens of the encoder's, this model takes 64; shorten it"
# Line ends of Unicode's, which are no line ends of a stream.
SEPARATORS = "a\u2028b\x85c\x0bd"


class Stub(ThreadingHTTPServer):
    """Answers `KIND hears: PROMPT`, a word at a time."""

    daemon_threads = True

    def __init__(self, port=0, kind="layalign", key=None, pause=0.01):
        super().__init__(("127.0.0.1", port), Handler)
        self.kind, self.key, self.pause = kind, key, pause
        self.bodies, self.hung_up = [], threading.Semaphore(0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *given):
        pass

    def send(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/health":
            self.send(200, {})
        elif self.refused():
            pass
        else:
            self.send(200, {"data": [{"id": f"the {self.server.kind}", "max_model_len": 512}]})

    def refused(self):
        key = self.server.key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            self.send(401, {"error": "Unauthorized"})
            return True
        return False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        prompt = body["prompt"]
        if self.refused():
            return
        if "long" in prompt:
            self.send(400, {"error": {"message": REFUSAL, "type": "BadRequestError", "code": 400}})
            return
        if "status" in prompt:
            self.send(500, "")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.stream(prompt, body["max_tokens"])

    def stream(self, prompt, most):
        words = ["for ever and"] * 10**6 if "forever" in prompt else f"{self.server.kind} hears: {prompt}".split(" ")
        if "separators" in prompt:
            words = [SEPARATORS]
        try:
            for number, word in enumerate(words[:most]):
                if number == 2 and "breaks" in prompt:
                    self.close_connection = True
                    return
                if number == 2 and "stumbles" in prompt:
                    self.event({"error": {"message": "the engine is dead"}})
                    return
                if number == 2 and "babbles" in prompt:
                    self.piece(b"data: {words\n\n")
                if number == 2 and "kills" in prompt and self.server.kind == "llm":
                    print("no memory is left", flush=True)
                    os._exit(3)
                last = number + 1 == min(len(words), most)
                finish = ("length" if most < len(words) else "stop") if last else None
                choice = {"index": 0, "text": " " * bool(number) + word, "finish_reason": finish}
                self.event({"choices": [choice], "usage": {"completion_tokens": 2 * number + 2}})
                time.sleep(self.server.pause)
            self.event({"choices": [], "usage": {"completion_tokens": 2 * len(words)}})
            self.piece(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            print("hung up", flush=True)
            self.server.hung_up.release()

    def event(self, value):
        self.piece(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def piece(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def main(words):
    kind = next(word for word in words if word in ("layalign", "llm"))
    port = int([value for name, value in pairwise(words) if name == "--port"][-1])
    print("starting", *words, flush=True)
    if f"--dies-{kind}" in words:
        print("no memory is left", flush=True)
        sys.exit(3)
    if f"--hangs-{kind}" in words:
        time.sleep(600)
    Stub(port, kind, pause=0.05).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
