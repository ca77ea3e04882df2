"""LayAlign in lm-evaluation-harness: the same accuracy as `layalign evaluate`, what encoder and LLM read, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install 'layalign[lm-eval]')"
)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor  # noqa: E402
from layalign.evaluation.settings import GenerationSettings  # noqa: E402
from layalign.generation.texts import Answerer  # noqa: E402
from layalign.harness import TASKS  # noqa: E402
from layalign.harness.model import LayAlignHarnessModel  # noqa: E402
from layalign.loading import load_model  # noqa: E402
from layalign.tasks import find_task  # noqa: E402
from layalign.tasks.numbers import official_number  # noqa: E402

TEMPLATE = "{text}\nAnswer:"
QUESTIONS = {
    "sw": [
        "Asha ana matufaha 3 na Juma ana 4. Wana mangapi?",
        "2 + 5?",
        "Nina 9, nimekula 1. Zimebaki ngapi?",
        "8 na 8?",
    ],
    "de": [
        "Anna hat 3 Bücher und kauft 6. Wie viele hat sie?",
        "7 + 1?",
        "12 Eier, 4 zerbrechen. Wie viele bleiben?",
        "5 - 2?",
    ],
}
BASES = ("layalign:tiny_encoder", "layalign:tiny_llm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model on the demonstration's bases whose trained part is random."""
    torch.manual_seed(0)
    model = LayAlignForConditionalGeneration.from_bases(*BASES)
    for name, parameter in model.trained_parameters():
        parameter.data.normal_(std=0.5 if "gate" in name else 0.05)
    path = tmp_path_factory.mktemp("harness") / "model"
    model.save_pretrained(path)
    LayAlignProcessor.from_bases(*BASES, TEMPLATE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def answerer(folder):
    return Answerer(*load_model(folder, device="cpu"), max_new_tokens=12, batch_size=3)


@pytest.fixture(scope="module")
def mgsm(answerer, tmp_path_factory):
    """Files in MGSM's layout; every other answer is what the model says, so that accuracies are neither 0 nor 100."""
    path = tmp_path_factory.mktemp("mgsm")
    for lang, questions in QUESTIONS.items():
        numbers = [official_number(answer) for answer in answerer(questions)]
        rows = [
            f"{question}\t{number + place % 2:g}\n"
            for place, (question, number) in enumerate(zip(questions, numbers, strict=True))
        ]
        (path / f"mgsm_{lang}.tsv").write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def xcsqa(tmp_path_factory):
    path = tmp_path_factory.mktemp("xcsqa")
    for lang, words in {"sw": "nyumba gari mti maji moto", "de": "Haus Auto Baum Wasser Feuer"}.items():
        choices = [{"label": letter, "text": word} for letter, word in zip("ABCDE", words.split(), strict=True)]
        rows = [
            {
                "id": str(place),
                "lang": lang,
                "question": {"stem": question, "choices": choices},
                "answerKey": "ABCDE"[place],
            }
            for place, question in enumerate(QUESTIONS[lang])
        ]
        (path / lang).mkdir()
        (path / lang / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluated(folder, tasks, data, batch_size=3, **options):
    """{task: {metric: share}} by the harness."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)})
    found = lm_eval.simple_evaluate(
        model="layalign",
        model_args={"pretrained": folder, **options},
        tasks=tasks,
        batch_size=batch_size,
        device="cpu",
        task_manager=manager,
        gen_kwargs={"max_gen_toks": 12},
        bootstrap_iters=0,
        log_samples=True,
    )
    metrics = {
        task: {
            name.removesuffix(",none"): value
            for name, value in values.items()
            if name.endswith(",none") and "stderr" not in name
        }
        for task, values in found["results"].items()
    }
    return metrics, found["samples"]


@pytest.mark.parametrize("prompt", ["default", "task", "none", "context", "{text} \nso"])
def test_mgsm_as_by_layalign_evaluate(folder, mgsm, tmp_path, prompt):
    from layalign.evaluation.run import evaluate

    same = "{text}" if prompt == "context" else prompt
    settings = GenerationSettings(batch_size=2, max_new_tokens=12, device="cpu", prompt=same)
    output = tmp_path / "run"
    found = evaluate(
        folder, "mgsm", data=mgsm, languages=["sw", "de"], output=output, settings=settings, progress=False
    )
    ours = found["tasks"]["mgsm"]["accuracy"]
    theirs, samples = evaluated(folder, ["layalign_mgsm_sw", "layalign_mgsm_de"], mgsm, prompt=prompt)
    for lang in ("sw", "de"):
        found = theirs[f"layalign_mgsm_{lang}"]
        assert {name: 100 * found[name] for name in ("official", "strict")} == {
            name: ours[name][lang] for name in ("official", "strict")
        }
    written = {
        (row["doc"]["lang"], row["doc"]["index"]): row["resps"][0][0].strip()
        for rows in samples.values()
        for row in rows
    }
    records = [
        json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert written == {(record["lang"], record["index"]): record["prediction"] for record in records}
    if prompt == "default":
        assert 0 < ours["official"]["sw"] < 100


def test_msvamp_reads_its_published_files(folder, mgsm, tmp_path):
    for lang, name in {"sw": "Swahili", "de": "German"}.items():
        lines = (mgsm / f"mgsm_{lang}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [dict(zip(("m_query", "response"), line.split("\t"), strict=True)) for line in lines]
        (tmp_path / f"test_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = ["layalign_msvamp_sw", "layalign_msvamp_de"]
    same, _ = evaluated(folder, tasks, tmp_path, prompt="default")
    mgsm_scores, _ = evaluated(folder, [name.replace("msvamp", "mgsm") for name in tasks], mgsm, prompt="default")
    assert [same[name] | {"alias": 0} for name in tasks] == [
        mgsm_scores[name.replace("msvamp", "mgsm")] | {"alias": 0} for name in tasks
    ]


def test_xcsqa_by_text_and_by_likelihood(folder, answerer, xcsqa):
    """The choices' log-likelihoods are those that `layalign evaluate` compares."""
    problems = find_task("xcsqa").load(xcsqa, ["sw", "de"], None)
    values = answerer.loglikelihoods([row["question"] for row in problems], [row["choices"] for row in problems])
    tasks = ["layalign_xcsqa_choices_sw", "layalign_xcsqa_choices_de", "layalign_xcsqa_sw"]
    theirs, samples = evaluated(folder, tasks, xcsqa, prompt="default")
    found = {
        (row["doc"]["lang"], row["doc"]["index"]): [score for score, _ in (pair[0] for pair in row["resps"])]
        for task in tasks[:2]
        for row in samples[task]
    }
    for row, expected in zip(problems, values, strict=True):
        assert found[row["lang"], row["index"]] == pytest.approx(expected, rel=1e-5)
    best = [
        max(range(5), key=row.__getitem__) == "ABCDE".index(problem["answer"])
        for row, problem in zip(values, problems, strict=True)
    ]
    assert theirs["layalign_xcsqa_choices_sw"]["acc"] == sum(best[:4]) / 4
    answers = answerer([row["question"] for row in problems[:4]])
    right = [answer == row["answer"] for answer, row in zip(answers, problems, strict=False)]
    assert theirs["layalign_xcsqa_sw"]["official"] == sum(right) / 4


def request(context, *rest, **doc):
    return Instance(request_type="x", doc=doc, arguments=(context, *rest), idx=0, metadata=("some_task", 0, 1))


def test_what_encoder_and_llm_read(folder, answerer):
    """The context as it is, unless something else is said."""
    questions = [*QUESTIONS["sw"], *QUESTIONS["de"]]
    contexts = [f"How many? {text}\nAnswer:" for text in questions]
    asked = [
        request(context, {"until": [], "max_gen_toks": 8}, question=text)
        for context, text in zip(contexts, questions, strict=True)
    ]

    def by_hand(text, prompt):
        model, processor = answerer.model, answerer.processor
        row = model.generate(**processor(text, prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
        end = processor.tokenizer.eos_token_id
        return processor.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True)

    expected = {
        (): lambda place: (contexts[place], contexts[place]),
        (("encoder_input", "doc"),): lambda place: (questions[place], contexts[place]),
        (("encoder_input", "doc:question"), ("prompt", "none")): lambda place: (questions[place], None),
        (("encoder_input", "doc"), ("prompt", "default")): lambda place: (
            questions[place],
            f"{questions[place]}\nAnswer:",
        ),
        (("prompt", "{text} Answer:"),): lambda place: (contexts[place], f"{contexts[place]} Answer:"),
    }
    seen = []
    for options, reads in expected.items():
        model = LayAlignHarnessModel(folder, device="cpu", batch_size="2", **dict(options))
        answers = model.generate_until(asked, disable_tqdm=True)
        assert answers == [by_hand(*reads(place)) for place in range(len(asked))], options
        seen.append(tuple(answers))
    assert len(set(seen)) == len(expected)


def test_answers_end_at_until(folder):
    model = LayAlignHarnessModel(folder, device="cpu", batch_size=4)
    texts = [f"{text}\nAnswer:" for questions in QUESTIONS.values() for text in questions]
    whole = model.generate_until(
        [request(text, {"until": [], "max_gen_toks": 16}) for text in texts], disable_tqdm=True
    )
    end = max("".join(whole), key=lambda character: sum(character in text for text in whole))
    cut = model.generate_until([request(text, {"until": end, "max_gen_toks": 16}) for text in texts], disable_tqdm=True)
    assert cut == [text.partition(end)[0] for text in whole] != whole


def test_loglikelihoods_of_a_context_and_what_follows_it(folder, answerer):
    """Prompt and continuation are one text, and greedy says whether each token is the likeliest."""
    model, processor = answerer.model, answerer.processor
    harness = LayAlignHarnessModel(folder, device="cpu", batch_size=3)
    context = f"{QUESTIONS['de'][0]}\nAnswer:"
    greedy = harness.generate_until([request(context, {"until": [], "max_gen_toks": 3})], disable_tqdm=True)[0]
    said = [" 9", " A", f" {greedy}", " 12 7", "7"]  # of the last, the token depends on what stands before it
    found = harness.loglikelihood([request(context, text) for text in said], disable_tqdm=True)
    tokenizer = processor.tokenizer
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    for text, (value, likeliest) in zip(said, found, strict=True):
        ids = tokenizer(context + text, add_special_tokens=False)["input_ids"]
        targets = torch.tensor(ids[min(len(before), len(ids) - 1) :])
        with torch.no_grad():
            logits = model(**processor(context, None), input_ids=torch.tensor([ids])).logits[0, -len(targets) - 1 : -1]
        logs = logits.double().log_softmax(-1)
        assert value == pytest.approx(logs.gather(1, targets[:, None]).sum().item(), rel=1e-5)
        assert likeliest == bool((logits.argmax(-1) == targets).all())
    assert len({likeliest for _, likeliest in found}) == 2


def test_with_a_prompt_continuations_are_read_as_training_targets_are(folder, answerer):
    harness = LayAlignHarnessModel(folder, device="cpu", batch_size=3, prompt="default")
    texts = [*QUESTIONS["de"], *QUESTIONS["sw"]]
    expected = answerer.loglikelihoods(texts, [["7"]] * len(texts))
    for said in ("7", " 7"):
        found = harness.loglikelihood([request(text, said) for text in texts], disable_tqdm=True)
        assert [value for value, _ in found] == pytest.approx([value for (value,) in expected], rel=1e-5)


def test_requests_keep_their_own_arguments(folder):
    model = LayAlignHarnessModel(folder, device="cpu", batch_size=8)
    texts = [f"{text}\nAnswer:" for text in QUESTIONS["de"]]
    arguments = [{"until": [], "max_gen_toks": 2 + 4 * (place % 2)} for place in range(4)]
    together = model.generate_until([request(*pair) for pair in zip(texts, arguments, strict=True)], disable_tqdm=True)
    alone = [
        model.generate_until([request(*pair)], disable_tqdm=True)[0] for pair in zip(texts, arguments, strict=True)
    ]
    assert together == alone
    assert len(together[0]) < len(together[1])


@pytest.mark.slow
def test_the_command_line(folder, mgsm, tmp_path):
    arguments = [
        "--model",
        "layalign",
        "--model_args",
        f"pretrained={folder}",
        "prompt=task",
        "--tasks",
        "layalign_mgsm_sw",
    ]
    arguments += ["--metadata", f"data={mgsm}", "--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path)]
    command = [sys.executable, "-m", "layalign.harness", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "layalign_mgsm_sw" in done.stdout
    (file,) = tmp_path.rglob("results_*.json")
    assert set(json.loads(file.read_text())["results"]) == {"layalign_mgsm_sw"}


def test_what_is_wrong_is_said_in_one_line(capsys, monkeypatch):
    from layalign.harness import main

    def refuse():
        raise ValueError("model: no such folder: x")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    monkeypatch.setattr(sys, "argv", ["layalign-lm-eval", "--model", "layalign"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "error: model: no such folder: x\n"
    assert sys.argv[-2:] == ["--include_path", str(TASKS)]
    own = ["layalign-lm-eval", "--include_path=mine", "--model", "layalign"]
    monkeypatch.setattr(sys, "argv", list(own))
    with pytest.raises(SystemExit):
        main()
    assert sys.argv == own
    monkeypatch.setattr("layalign.harness.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install 'layalign[lm-eval]'" in capsys.readouterr().err


def test_the_harness_keeps_its_own_models():
    code = "import layalign.harness\nfrom lm_eval.api.registry import get_model\nprint(get_model('layalign'), get_model('dummy'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        done.stdout == "<class 'layalign.harness.model.LayAlignHarnessModel'> <class 'lm_eval.models.dummy.DummyLM'>\n"
    ), done.stderr


def test_every_language_of_a_task_is_a_harness_task():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    for name, count in {"mgsm": 11, "msvamp": 10, "xcsqa": 16, "xcsqa_choices": 16}.items():
        assert f"layalign_{name}" in manager.all_groups
        listed = [task for task in manager.all_subtasks if task.rpartition("_")[0] == f"layalign_{name}"]
        assert len(listed) == count
        assert {f"{task.removeprefix('layalign_')}.yaml" for task in listed} <= {
            path.name for path in Path(TASKS).iterdir()
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, r"batch_size: got 'auto', takes a positive int"),
        ({"batch_size": 0}, r"batch_size: got 0, takes a positive int"),
        ({"encoder_input": "question"}, r"encoder_input: got 'question', takes context, doc or doc:FIELD"),
        (
            {"prompt": "no place"},
            r"prompt: got 'no place', takes 'default', 'task', .* a text that contains .*; or 'context'",
        ),
        ({"prompt_file": "/nowhere/x"}, r"prompt_file: /nowhere/x cannot be read"),
        ({"prompt_file": "x", "prompt": "none"}, r"prompt_file: got 'x' and prompt 'none', takes one of them"),
        ({"dtype": "int3"}, r"dtype: got 'int3', takes float32, bfloat16, float16 or auto"),
        ({"parallelize": True}, r"model_args: got parallelize, takes pretrained, dtype, device, batch_size"),
        ({"prompt": "chat"}, r"'chat' needs a chat template"),
    ],
)
def test_options_that_there_are_not(folder, options, message):
    with pytest.raises(ValueError, match=message):
        LayAlignHarnessModel(folder, **{"device": "cpu", **options})


def test_what_else_is_refused(folder, monkeypatch):
    model = LayAlignHarnessModel(folder, device="cpu", encoder_input="doc", prompt="task")
    with pytest.raises(ValueError, match="loglikelihood_rolling: LayAlign reads a question and writes an answer"):
        model.loglikelihood_rolling([])
    with pytest.raises(
        ValueError, match="encoder_input: the documents of some_task have no text 'question'; they have answer"
    ):
        model.generate_until([request("a", {}, answer="b")], disable_tqdm=True)
    with pytest.raises(
        ValueError, match="prompt=task: the documents of some_task have no text 'prompt'; they have question"
    ):
        model.generate_until([request("a", {}, question="b")], disable_tqdm=True)
    with pytest.raises(ValueError, match="encoder_input, text 0 of a batch: got '', takes a text that is not empty"):
        LayAlignHarnessModel(folder, device="cpu").loglikelihood([request("", " a")], disable_tqdm=True)
    with pytest.raises(ValueError, match="apply_chat_template: the LLM's tokenizer has no chat template"):
        model.chat_template(True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2: the harness's model runs in one process"):
        LayAlignHarnessModel(folder)


def test_conversations_are_put_into_the_llms_template(folder):
    model = LayAlignHarnessModel(folder, device="cpu")
    tokenizer = model.processor.tokenizer
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    said = [{"role": "user", "content": "2 + 2?"}]
    assert model.apply_chat_template(said) == "user: 2 + 2?\n"
    assert model.chat_template(True) == tokenizer.chat_template
    assert model.chat_template(False) is None
    assert "/" not in model.tokenizer_name
