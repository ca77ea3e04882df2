"""The page as people see it: `layalign serve MODEL --ui` with stubs for its servers, in headless Chromium."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.serving.stub_server import REFUSAL

pytest.importorskip("gradio", reason="gradio is not installed (layalign[ui])")

from tests.serving.test_page import free_port, python  # noqa: F401

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (chromium, chromium-driver)"),
]
ROOT = Path(__file__).parents[2]
QUESTION = "Asha ana matufaha 3 na Juma ana 4. Wana mangapi?"


@pytest.fixture(scope="module")
def page(model_folder, python, tmp_path_factory):  # noqa: F811
    """(process, the page's address, LayAlign's server's address, folder of the servers' logs)."""
    port, log = free_port(), tmp_path_factory.mktemp("page") / "log"
    words = ["--ui", "--ui-port", str(free_port()), "--vllm-python", python, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HTTP_PROXY": "http://127.0.0.1:9"}
    with log.open("w") as output:
        command = [sys.executable, "-m", "layalign", "serve", model_folder, *words]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        address, ends = None, time.monotonic() + 240
        while address is None:
            assert process.poll() is None and time.monotonic() < ends, log.read_text()
            address = re.search(r"the page: (\S+)", log.read_text())
            time.sleep(0.2)
        logs = Path(re.search(r"their logs are in (\S+)", log.read_text())[1])
        yield process, address[1], f"http://127.0.0.1:{port}", logs
    finally:
        process.terminate()
        process.wait(60)


class Browser:
    """The page in Chromium."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, place):
        return self.driver.find_elements("css selector", place)

    def answers(self):
        """(texts, notes) of both sides."""
        texts = [box.get_property("value") for box in self.find("textarea")[1:]]
        return texts, [note.text for note in self.find(".note .html-container")]

    def ask(self, question):
        (box,) = self.find("#question textarea")
        box.clear()
        box.send_keys(question)
        self.find("#ask")[0].click()

    def until(self, holds):
        """What the page showed until `holds` of it."""
        seen, ends = [self.answers()], time.monotonic() + 60
        while not holds(*seen[-1]):
            assert time.monotonic() < ends, seen[-1]
            time.sleep(0.05)
            seen.append(self.answers())
        return seen


@pytest.fixture(scope="module")
def browser(page):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.implicitly_wait(60)
        driver.get(page[1])
        driver.find_element("css selector", "#question textarea")
        driver.implicitly_wait(0)
        yield Browser(driver)
    finally:
        driver.quit()


def test_a_question_gets_both_answers(browser):
    """And their pace; that they grow at the same time is seen in `test_stop`, where neither ends."""
    expected = [f"layalign hears: {QUESTION}", f"llm hears: {QUESTION}\nAnswer:"]
    browser.ask(QUESTION)
    seen = browser.until(lambda texts, notes: texts == expected and all("first after" in note for note in notes))
    _, notes = seen[-1]
    assert all(re.match(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s", note) for note in notes)


def test_a_refusal_is_a_sentence(browser):
    browser.ask("this is long")
    browser.until(lambda texts, notes: texts == ["", ""] and all(REFUSAL in note for note in notes))


def test_stop(browser, page):
    """Both are written at the same time; what has come stays, and the servers go on no longer; then an example is asked."""
    browser.ask("forever")
    browser.until(lambda texts, notes: all("and" in text for text in texts))
    browser.find("#stop")[0].click()
    ends = time.monotonic() + 10
    while not all("hung up" in log.read_text() for log in page[3].glob("*.log")):
        assert time.monotonic() < ends
        time.sleep(0.05)
    texts, notes = browser.answers()
    assert all("for ever" in text for text in texts) and not any("cut at" in note for note in notes)
    browser.find("#examples button")[0].click()
    browser.until(lambda *_: browser.find("#question textarea")[0].get_property("value").startswith("Asha"))
    browser.find("#ask")[0].click()
    browser.until(lambda texts, notes: all("Asha ana matufaha 17" in text for text in texts))


def test_nothing_comes_from_elsewhere(browser, page):
    """No script, no font, no count of visitors."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((page[1], "data:", "blob:"))] == []


def test_sigterm_ends_the_page_and_its_servers(page):
    process, address, server, logs = page
    for url in (address, f"{server}/health"):
        assert urllib.request.urlopen(url, timeout=10).status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not logs.exists()
    for url in (address, f"{server}/health"):
        with pytest.raises(OSError):
            urllib.request.urlopen(url, timeout=5)
