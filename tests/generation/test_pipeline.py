"""transformers.pipeline over a LayAlign model, and the example of continuous serving."""

import importlib.util
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.data import Dataset

from layalign import LayAlignPipeline
from layalign.generation.texts import Answerer

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_new_tokens": 6}


@pytest.fixture
def expected(loaded, questions):
    return Answerer(*loaded, **SETTINGS)(questions)


def test_the_task_works_by_folder_as_layalign_generate_does(model_folder, questions, expected):
    pipe = transformers.pipeline("layalign-generation", model=str(model_folder), device="cpu", **SETTINGS)
    assert isinstance(pipe, LayAlignPipeline)
    assert pipe(questions[0]) == [{"generated_text": expected[0]}]
    for batch_size in (1, 4, 64):
        assert pipe(questions, batch_size=batch_size) == [[{"generated_text": answer}] for answer in expected]
    assert pipe(questions[:2], max_new_tokens=1) != pipe(questions[:2])


def test_a_pipeline_of_a_model_with_generate_arguments(loaded, questions):
    pipe = LayAlignPipeline(*loaded, device="cpu", batch_size=3, num_beams=3, num_return_sequences=2, **SETTINGS)
    sequences = Answerer(*loaded, num_beams=3, num_return_sequences=2, **SETTINGS).sequences(questions[:4])
    assert pipe(questions[:4]) == [[{"generated_text": answer} for answer in answers] for answers in sequences]
    without = Answerer(*loaded, prompt=None, **SETTINGS)(questions[:1])
    assert LayAlignPipeline(*loaded, prompt=None, **SETTINGS)(questions[0]) == [{"generated_text": without[0]}]
    assert pipe([]) == []
    assert pipe(tuple(questions[:4])) == pipe(questions[:4])


def test_generators_and_datasets_are_answered_as_they_are_read(loaded, questions, expected):
    read = []

    def lines():
        for text in questions:
            read.append(text)
            yield text

    class Texts(Dataset):
        def __len__(self):
            return len(questions)

        def __getitem__(self, index):
            return questions[index]

    pipe = LayAlignPipeline(*loaded, batch_size=4, **SETTINGS)
    answers = pipe(lines())
    assert next(answers) == [{"generated_text": expected[0]}]
    assert len(read) <= 5
    assert [answer["generated_text"] for (answer,) in answers] == expected[1:]
    assert [answer["generated_text"] for (answer,) in pipe(Texts())] == expected


def test_a_tokenizer_without_padding_batches_too(model_folder, questions, expected):
    pipe = transformers.pipeline("layalign-generation", model=str(model_folder), device="cpu", **SETTINGS)
    pipe.tokenizer.pad_token = None
    assert [answer["generated_text"] for (answer,) in pipe(questions, batch_size=5)] == expected


def test_a_generation_config_is_heard(loaded, questions):
    """As in `generate`, whose arguments would win over it."""

    def answers(**given):
        torch.manual_seed(0)
        return Answerer(*loaded, **given)(questions[:4])

    def config(**given):
        return {"generation_config": transformers.GenerationConfig(**given)}

    sampled = answers(do_sample=True, temperature=3.0, max_new_tokens=5)
    assert answers(**config(do_sample=True, temperature=3.0, max_new_tokens=5)) == sampled
    assert (
        answers(max_new_tokens=5, **config(do_sample=False, max_new_tokens=2)) == answers(max_new_tokens=5) != sampled
    )
    (end,) = loaded[1].tokenizer(answers(max_new_tokens=5)[0].split()[1], add_special_tokens=False)["input_ids"][:1]
    assert answers(**config(eos_token_id=end, max_new_tokens=5)) == answers(eos_token_id=end, max_new_tokens=5)


def test_a_language_is_passed_on(loaded, questions):
    pipe = LayAlignPipeline(*loaded, **SETTINGS | {"prompt": "{language} {text} answer"})
    expected = Answerer(*loaded, **SETTINGS | {"prompt": "{language} {text} answer"})(questions[:2], langs=["sw", "sw"])
    assert [answer["generated_text"] for (answer,) in pipe(questions[:2], lang="sw")] == expected


def test_one_text_is_streamed(loaded, questions, expected, capsys):
    pipe = LayAlignPipeline(*loaded, **SETTINGS)
    pipe(questions[0], streamer=transformers.TextStreamer(pipe.tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == expected[0]


def test_bad_calls(loaded, questions):
    model, processor = loaded
    pipe = LayAlignPipeline(model, processor)
    for text in ("  ", 5, ["what", None]):
        with pytest.raises(ValueError, match=r"text: got (' +'|5|None), takes a text"):
            pipe(text)
    with pytest.raises(ValueError, match="processor: got NoneType, takes the model's LayAlignProcessor"):
        LayAlignPipeline(model)
    with pytest.raises(ValueError, match=r"model: got a .*LlamaForCausalLM"):
        LayAlignPipeline(model.llm, processor)
    with pytest.raises(ValueError, match="not used by the model"):
        pipe(questions[0], max_new_token=3)
    with pytest.raises(ValueError, match="max_new_tokens: got 0"):
        pipe(questions[0], max_new_tokens=0)


@pytest.fixture
def serving():
    specification = importlib.util.spec_from_file_location("serving", ROOT / "examples" / "continuous_serving.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["serving"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["serving"]


def test_requests_join_and_leave_a_running_batch(serving, loaded, questions, monkeypatch):
    """The second half arrives while the first is being decoded; every answer is the one without neighbours."""
    limits = [2 + 3 * (index % 4) for index in range(len(questions))]
    expected = [
        Answerer(*loaded, max_new_tokens=limit)([text])[0] for text, limit in zip(questions, limits, strict=True)
    ]
    started, go_on, rounds = threading.Event(), threading.Event(), []
    decode = serving.Server._round

    def watched(self, active):
        rounds.append([request.text for request in active])
        decode(self, active)
        started.set()
        assert go_on.wait(60)

    monkeypatch.setattr(serving.Server, "_round", watched)
    with serving.Server(*loaded, max_batch=5, tokens_per_round=2) as server:
        futures = [server.submit(*pair) for pair in zip(questions[:10], limits, strict=False)]
        assert started.wait(60)
        futures += [server.submit(*pair) for pair in zip(questions[10:], limits[10:], strict=True)]
        go_on.set()
        assert [future.result(60) for future in futures] == expected
    assert all(len(texts) <= 5 for texts in rounds)
    assert any(set(earlier) & set(later) and set(later) - set(earlier) for earlier, later in pairwise(rounds))


def test_a_failing_round_reaches_its_requests_and_the_server_goes_on(serving, loaded, questions, monkeypatch):
    with serving.Server(*loaded) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.model, "generate", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                server.submit(questions[0]).result(60)
        assert server.submit(questions[0], 6).result(60) == Answerer(*loaded, **SETTINGS)(questions[:1])[0]
        with pytest.raises(ValueError, match="got text ' '"):
            server.submit(" ")
        monkeypatch.setattr(server.model, "encoder_limit", 2)
        with pytest.raises(ValueError, match=r"got a text of \d+ tokens, the encoder takes 2"):
            server.submit(questions[0])


@pytest.mark.slow
def test_the_example_runs_as_a_script(model_folder, questions):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "continuous_serving.py", model_folder],
        input="\n".join(questions[:3]),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if not line.startswith("  ")] == sorted(
        questions[:3], key=result.stdout.index
    )
