"""An LLM alone: prompts, chat templates, worked examples, what is refused."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from layalign.evaluation.settings import GenerationSettings
from layalign.generation.stopping import EndsWith
from layalign.generation.texts import LLMAnswerer
from layalign.systems import LLM, LayAlignModel, read_examples

SETTINGS = GenerationSettings(batch_size=4, max_new_tokens=6, device="cpu")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} so {% endfor %}"
    "{% if add_generation_prompt %}answer{% endif %}"
)
EXAMPLES = [
    {"question": "what is 1", "answer": "2", "lang": "en"},
    {"question": "ni 3", "answer": "4", "lang": "Swahili"},
    {"question": "what is 5", "answer": "6", "lang": "en"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def examples(tmp_path):
    return write(tmp_path / "examples.jsonl", EXAMPLES)


@pytest.fixture
def plain_examples(tmp_path):
    """The same without languages, tab-separated."""
    path = tmp_path / "examples.tsv"
    path.write_text("".join(f"{row['question']}\t{row['answer']}\n" for row in EXAMPLES), encoding="utf-8")
    return str(path)


@pytest.fixture
def chat_llm(bases, tmp_path):
    """A copy of the LLM whose tokenizer has a chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(bases / "llm").save_pretrained(tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(bases / "llm")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chatty")
    return str(tmp_path / "chatty")


@pytest.fixture
def byte_pair_llm(bases, tmp_path):
    """A copy of the LLM whose tokenizer has pieces with the space before them, and the space alone."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    AutoModelForCausalLM.from_pretrained(bases / "llm").save_pretrained(tmp_path / "bytes")
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyzL:" + pre_tokenizers.ByteLevel.alphabet()[0]]
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<s>", "</s>"], initial_alphabet=[*letters, "\u0120"])
    found.train_from_iterator(["Label: ent ent ent Label: ailment"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="</s>")
    assert len(tokenizer("Label: ")["input_ids"]) > len(tokenizer("Label:")["input_ids"])
    tokenizer.save_pretrained(tmp_path / "bytes")
    return str(tmp_path / "bytes")


def llm(bases, **options):
    return LLM(llm=str(bases / "llm"), settings=SETTINGS, **options)


def test_nothing_is_loaded_before_it_is_asked_for(bases, monkeypatch):
    from layalign.systems import llm as module

    loads = []
    real = module.load_llm
    monkeypatch.setattr(module, "load_llm", lambda *given: loads.append(given) or real(*given))
    system = llm(bases)
    system.check(["sw"])
    assert system.name == "llm"
    assert set(system.fingerprint()) == {"llm"}
    assert not loads
    first, second = system.load(), system.load("question {text}")
    assert len(loads) == 1
    assert first.model is second.model


def test_answers_are_the_llms_own(bases, questions):
    system = llm(bases)
    answerer = system.load("question {text} answer")
    plain = LLMAnswerer(answerer.model, answerer.tokenizer, "question {text} answer", max_new_tokens=6)
    assert answerer(questions) == plain(questions)
    own = LLMAnswerer(answerer.model, answerer.tokenizer, max_new_tokens=6)
    assert system.load()(questions) == own(questions)


def test_examples_stand_before_the_question(bases, plain_examples):
    answerer = llm(bases, examples=plain_examples, shots=2).load()
    expected = "Question: what is 1\nAnswer: 2\n\nQuestion: ni 3\nAnswer: 4\n\nQuestion: how many\nAnswer:"
    assert answerer.prompt("how many") == answerer.prompt("how many", "sw") == expected
    named = llm(bases, examples=plain_examples, shots=1).load("{language} {text} \n")
    assert named.prompt("how many", "sw") == "Swahili what is 1 \n2\n\nSwahili how many \n"


def test_examples_are_in_the_questions_language(bases, examples, questions):
    system = llm(bases, examples=examples, shots=1)
    answerer = system.load()
    assert answerer.prompt("ngapi", "sw") == "Question: ni 3\nAnswer: 4\n\nQuestion: ngapi\nAnswer:"
    assert answerer.prompt("how many", "en") == "Question: what is 1\nAnswer: 2\n\nQuestion: how many\nAnswer:"
    langs = ["sw" if index % 3 else "en" for index in range(len(questions))]
    plain = LLMAnswerer(answerer.model, answerer.tokenizer, max_new_tokens=6)
    whole = plain([answerer.prompt(text, lang) for text, lang in zip(questions, langs, strict=True)])
    assert answerer(questions, langs=langs) == whole
    assert system.name == "llm (1-shot)"
    with pytest.raises(ValueError, match="shots: got 1, but there are 0 examples in 'th'"):
        system.check(["sw", "th"])
    with pytest.raises(ValueError, match="shots: got 3, but there are 2 examples in 'en'"):
        llm(bases, examples=examples, shots=3).check(["en"])
    with pytest.raises(ValueError, match="examples: they are by language, and a question comes without one"):
        answerer(questions)


def test_an_answer_ends_where_a_next_question_begins(bases, plain_examples):
    answerer = llm(bases, examples=plain_examples, shots=1).load()
    row = torch.tensor([5, 6])
    answerer.tokenizer = answerer.tokenizer.__class__.from_pretrained(bases / "llm")
    answerer.tokenizer.decode = lambda *_, **__: "18 apples\n\nso 18 \n\nQuestion: what"
    assert answerer._decode(row) == "18 apples\n\nso 18"
    answerer.tokenizer.decode = lambda *_, **__: "18 Question: what"
    assert answerer._decode(row) == "18 Question: what"


def test_generation_stops_there_too(bases, plain_examples, questions):
    """Words of the tests have no line ends; a head that the LLM does write is looked for instead."""
    answerer = llm(bases, examples=plain_examples, shots=1).load()
    full = answerer(questions)
    counted = answerer.new_tokens
    word = max(
        (word for answer in full for word in answer.split()), key=lambda word: sum(word in a.split() for a in full)
    )
    answerer._next = word
    answerer.new_tokens = 0
    cut = answerer(questions)
    assert cut == [answer.partition(word)[0].rstrip() for answer in full]
    assert answerer.new_tokens < counted


def test_chat(chat_llm, bases, questions, examples):
    system = LLM(llm=chat_llm, settings=SETTINGS)
    answerer = system.load("chat")
    plain = LLMAnswerer(answerer.model, answerer.tokenizer, "user : {text} so answer", max_new_tokens=6, add_bos=True)
    assert answerer(questions) == plain(questions)
    few = LLM(llm=chat_llm, settings=SETTINGS, examples=examples, shots=1).load("chat")
    assert few.prompt("ngapi", "sw") == "user : ni 3 so assistant : 4 so user : ngapi so answer"
    langs = ["en"] * len(questions)
    assert few(questions, langs=langs) == plain.__class__(
        answerer.model, answerer.tokenizer, max_new_tokens=6, add_bos=True
    )([few.prompt(text, "en") for text in questions])
    with pytest.raises(ValueError, match=r"prompt: 'chat' needs a chat template, and the LLM's .* has none"):
        llm(bases).load("chat")


def test_likelihoods_are_those_of_the_text_as_a_whole(bases, plain_examples, questions):
    answerer = llm(bases, examples=plain_examples, shots=1).load()
    choices = [["3 apples", "4"] for _ in questions]
    found = answerer.loglikelihoods(questions, choices)
    model, tokenizer = answerer.model, answerer.tokenizer
    for text, values in zip(questions, found, strict=True):
        for said, value in zip(["3 apples", "4"], values, strict=True):
            ids = tokenizer(answerer.prompt(text) + " " + said, return_tensors="pt")["input_ids"]
            count = len(said.split())
            with torch.no_grad():
                logs = model(ids).logits[0, -count - 1 : -1].double().log_softmax(-1)
            assert value == pytest.approx(logs.gather(1, ids[0, -count:, None]).sum().item(), rel=1e-5)


def test_a_choices_tokens_depend_on_what_stands_before_them():
    answerer = LLM(llm="layalign:tiny_llm", settings=SETTINGS).load("{text} is\n")
    model, tokenizer = answerer.model, answerer.tokenizer
    ids = tokenizer("2 + 2 is\n4", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() != tokenizer("2 + 2 is\n")["input_ids"] + tokenizer("4")["input_ids"]
    with torch.no_grad():
        logs = model(ids).logits[0, -2].double().log_softmax(-1)
    assert answerer.loglikelihoods(["2 + 2"], [["4"]]) == [[pytest.approx(logs[ids[0, -1]].item(), rel=1e-5)]]


@pytest.mark.parametrize("end", ["", " ", "  "])
def test_spaces_at_a_prompts_end_are_the_choices(byte_pair_llm, end):
    """ "Label: " is two tokens with the space apart; before a choice the space is the choice's, and so are all of its pieces."""
    answerer = LLM(llm=byte_pair_llm, settings=SETTINGS).load("{text} Label:" + end)
    model, tokenizer = answerer.model, answerer.tokenizer
    said = (end or " ") + "entailment"
    before, ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in ("a b Label:", "a b Label:" + said))
    assert ids[0, : before.shape[1]].tolist() == before[0].tolist()
    with torch.no_grad():
        logs = model(ids).logits[0, before.shape[1] - 1 : -1].double().log_softmax(-1)
    expected = logs.gather(1, ids[0, before.shape[1] :, None]).sum().item()
    assert answerer.loglikelihoods(["a b"], [["entailment"]]) == [[pytest.approx(expected, rel=1e-5)]]


def test_a_chat_template_says_all_special_tokens_itself(chat_llm):
    """A tokenizer with a beginning of sequence of its own under a template without one: as apply_chat_template has it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_llm)
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    tokenizer.save_pretrained(chat_llm)
    answerer = LLM(llm=chat_llm, settings=SETTINGS).load("chat")
    own = answerer.tokenizer
    assert own("what")["input_ids"][0] == own.bos_token_id
    said = own.apply_chat_template([{"role": "user", "content": "what is 3"}], add_generation_prompt=True)
    assert answerer._prompt(answerer.prompt("what is 3")) == list(getattr(said, "input_ids", said))


def test_a_language_without_a_name_is_refused_before_anything_is_asked(bases):
    answerer = LLM(llm=str(bases / "llm"), settings=SETTINGS).load("{language} {text}")
    with pytest.raises(ValueError, match="ace_latn"):
        answerer.check(["what", "so"], langs=["sw", "ace_latn"])
    answerer.check(["what", "so"], langs=["sw", "th"])


def test_a_prompt_may_hold_what_ends_an_answer(bases):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bases / "llm")
    ends = EndsWith(tokenizer, ["how many"])
    rows = tokenizer(["what how many 1", "what is how 2"], return_tensors="pt")["input_ids"]
    assert ends(rows, None).tolist() == [False, False]  # one new token each
    rows = torch.cat([rows, tokenizer(["how", "how"], return_tensors="pt")["input_ids"]], 1)
    assert ends(rows, None).tolist() == [False, False]
    rows = torch.cat([rows, tokenizer(["many", "na"], return_tensors="pt")["input_ids"]], 1)
    assert ends(rows, None).tolist() == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}\n', r"x.jsonl:1: no field answer; it has question"),
        ('{"question": "a", "answer": "1"}\nnot json\n', r"x.jsonl:2: not JSON"),
        ('{"question": "a", "answer": "1"}\n["a"]\n', r"x.jsonl:2: got a list, takes a JSON object"),
        ('{"question": "a", "answer": 7}\n', r"x.jsonl:1: answer: got 7, takes a text"),
        ('{"question": " ", "answer": "7"}\n', r"x.jsonl:1: question: got ' ', takes a text"),
        ('{"question": "a", "answer": "1", "lang": 3}\n', r"x.jsonl:1: lang: got 3, takes a text"),
        (
            '{"question": "a", "answer": "1", "lang": "en"}\n{"question": "a", "answer": "1"}\n',
            r"x.jsonl:2: lang: some",
        ),
        ('{"question": "a {text}", "answer": "1"}\n', r"x.jsonl:1: an example holds \{text\}"),
        ("", r"x.jsonl: the file is empty"),
    ],
)
def test_malformed_examples(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_examples(path)


def test_malformed_tab_separated_examples(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a\t1\tde\nb\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"x.tsv:2: got 1 tab-separated fields, takes question, answer and perhaps a lang"
    ):
        read_examples(path)
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such file"):
        read_examples(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 2}, r"shots: got 2 and examples None, takes both or none"),
        ({"examples": "x.jsonl"}, r"shots: got 0 and examples 'x.jsonl', takes both or none"),
        ({"shots": -1}, r"shots: got -1, takes an int from 0"),
        ({"shots": True}, r"shots: got True, takes an int from 0"),
    ],
)
def test_options_that_do_not_go_together(bases, options, message):
    with pytest.raises(ValueError, match=message):
        llm(bases, **options)


def test_folders_that_are_none(bases, model_folder, t5, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "nothing_known"}')
    for path, message in {
        model_folder: r"llm: .*tiny holds a LayAlign model, takes a causal LM alone; give it as the model",
        t5: r"llm: .*t5 holds T5ForConditionalGeneration, takes a causal LM",
        bases / "encoder": r"llm: .*encoder holds MT5EncoderModel, takes a causal LM",
        tmp_path / "empty": r"llm: the folder .*empty holds no model \(no config.json\)",
        tmp_path / "file": r"llm: .*file is a file, takes the folder of a model",
        tmp_path / "nowhere": r"llm: no such folder: '.*nowhere'",
        tmp_path
        / "strange": r"llm: .*strange is neither a folder with a transformers config.json nor a model that can be",
        "": r"llm: got '', takes the folder or the hub name of a model",
        "layalign:nothing": r"no base called 'layalign:nothing' ships with layalign",
    }.items():
        for call in (LLM.check, LLM.load):
            with pytest.raises(ValueError, match=message):
                call(LLM(llm=str(path), settings=SETTINGS))


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', None])
def test_a_tokenizer_that_cannot_be_read(bases, tmp_path, content):
    """The tokenizers library raises a bare Exception at a kind of model that it does not know, the last of these."""
    folder = tmp_path / "llm"
    shutil.copytree(bases / "llm", folder)
    file = folder / "tokenizer.json"
    file.write_text(content or json.dumps(json.loads(file.read_text()) | {"model": {"type": "unknown"}}))
    with pytest.raises(ValueError, match=r"llm: .*llm holds no tokenizer that can be loaded: ."):
        LLM(llm=str(folder), settings=SETTINGS).load("{text}")


def test_prompts_that_an_llm_cannot_take(bases):
    with pytest.raises(ValueError, match="prompt: got none, but an LLM alone reads nothing else"):
        llm(bases).load(None)
    with pytest.raises(ValueError, match=r"or a text that contains \{text\} once"):
        llm(bases).load("no place for the question")


def test_what_tells_a_job_from_others(bases, chat_llm, examples, plain_examples):
    jobs = [
        llm(bases),
        LLM(llm=chat_llm),
        LLM(llm="layalign:tiny_llm"),
        llm(bases, examples=examples, shots=1),
        llm(bases, examples=examples, shots=2),
        llm(bases, examples=plain_examples, shots=1),
    ]
    prints = [json.dumps(job.fingerprint()) for job in jobs]
    assert len(set(prints)) == len(jobs)
    assert prints[0] == json.dumps(llm(bases).fingerprint())
    assert LLM(llm="some/hub-name").fingerprint() == {"llm": "some/hub-name"}


def test_a_layalign_model(model_folder, bases, questions, loaded):
    from layalign.generation.texts import Answerer

    system = LayAlignModel(model=str(model_folder), settings=SETTINGS)
    system.check(["sw"])
    assert system.name == "tiny"
    assert system.load()(questions) == Answerer(*loaded, max_new_tokens=6)(questions)
    assert system.load(None)(questions) == Answerer(*loaded, max_new_tokens=6, prompt=None)(questions)
    with pytest.raises(ValueError, match="model: no such folder"):
        LayAlignModel(model="/nowhere/at/all").check()
    with pytest.raises(ValueError, match="'chat' needs a chat template"):
        system.load("chat")
