"""Greedy answers of the engine are those of `model.generate`, whatever else is served at the same time."""

import re
import shutil
from pathlib import Path

import pytest

from tests.serving.conftest import QUESTIONS, engine, generated, greedy, served

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")


@pytest.fixture(scope="module")
def llm(model_folder):
    return engine(model_folder)


def test_alone(llm, questions, answers):
    assert [served(llm, question)[0] for question in questions[:8]] == answers[:8]


def test_answers_hang_on_the_encoder(answers):
    assert len({tuple(answer) for answer in answers}) > 40


def test_64_at_once(llm, questions, answers):
    assert served(llm, questions) == answers


def test_arriving_over_time(llm, questions, answers):
    """A request more every second step: prompts are read while others are answered, and places in the batch change hands."""
    core, found, waiting = llm.llm_engine, {}, list(enumerate(questions[:32]))
    step = 0
    while waiting or core.has_unfinished_requests():
        if waiting and step % 2 == 0:
            number, question = waiting.pop(0)
            core.add_request(str(number), question, greedy(4 + number % 30))
        for out in core.step():
            if out.finished:
                found[int(out.request_id.split("-")[0])] = list(out.outputs[0].token_ids)
        step += 1
    assert [found[number] for number in range(32)] == [answers[number][: 4 + number % 30] for number in range(32)]


def test_a_prompt_of_ones_own(llm, model_folder):
    """`encoder_prompt` for the encoder, `decoder_prompt` for the LLM, in place of the model's template."""
    prompts = [{"encoder_prompt": text, "decoder_prompt": "3 + 4 ="} for text in QUESTIONS]
    assert served(llm, prompts, least=0) == generated(model_folder, QUESTIONS, prompt="3 + 4 =")


def test_equal_prompts_different_questions(llm, model_folder):
    """What the LLM reads as text is the same, what the encoder reads is not."""
    found = served(llm, [{"encoder_prompt": text, "decoder_prompt": "="} for text in QUESTIONS])
    assert len({tuple(answer) for answer in found}) > 4


def test_samples_share_a_question(llm, answers, questions):
    from vllm import SamplingParams

    (out,) = llm.generate(questions[0], SamplingParams(n=4, temperature=1.0, max_tokens=8, seed=0), use_tqdm=False)
    assert len({tuple(sample.token_ids) for sample in out.outputs}) > 1
    assert served(llm, questions[0])[0] == answers[0]


def test_preempted_requests_and_prefix_caching(model_folder, questions, answers, monkeypatch):
    """A cache too small for all: requests lose their blocks and come back, beside new ones; asked for, prefixes are not shared."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, together = [], []
    preempt, schedule = Scheduler._preempt_request, Scheduler.schedule

    def seen(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    def looked_at(self, *args, **kwargs):
        made = schedule(self, *args, **kwargs)
        together.append(bool(made.scheduled_new_reqs) and bool(made.scheduled_cached_reqs.resumed_req_ids))
        return made

    monkeypatch.setattr(Scheduler, "_preempt_request", seen)
    monkeypatch.setattr(Scheduler, "schedule", looked_at)
    llm = engine(
        model_folder,
        max_model_len=160,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=20,
        block_size=32,
        enable_prefix_caching=True,
    )
    assert served(llm, questions) == answers
    assert len(preempted) > 4
    assert any(together)
    # Once more: what is in the cache from before is not taken for another question's.
    again = [questions[0], questions[1], questions[0]]
    assert served(llm, again) == [answers[0], answers[1], answers[0]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled(model_folder, questions, answers):
    """As vLLM runs a model unless told otherwise: the LLM by torch.compile, its cross-attention reading the cache that stands outside."""
    llm = engine(model_folder, enforce_eager=False)
    assert served(llm, questions) == answers
    assert served(llm, questions[3]) == answers[3:4]


def test_the_page_says_so(model_folder, capsys):
    """The Python block of docs/serving.md, with this model."""
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    exec(block.replace("runs/demo/model", model_folder), {})
    assert capsys.readouterr().out.count("answer: ") == 2
