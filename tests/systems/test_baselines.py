"""MindMerger and LangBridge as systems: who reads the prompt, what is refused. Their outputs: tests/model/test_published_baselines.py."""

import shutil
from pathlib import Path

import pytest

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.evaluation.settings import GenerationSettings
from layalign.generation.texts import Answerer
from layalign.published_baselines import load_published, published_processor
from layalign.systems import PublishedBaseline
from tests.tiny_models import word_tokenizer

RECORDED = Path(__file__).parents[1] / "model" / "published_baselines"
SETTINGS = GenerationSettings(batch_size=2, max_new_tokens=5, device="cpu")
TEXTS = ["what is 1", "ni 3 na", "apples"]
LANGS = ["en", "sw", "en"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """{"encoder", "llm"}: the bases that the recorded checkpoints were made on, with tokenizers."""
    folder = tmp_path_factory.mktemp("toys")
    words = [
        "what",
        "is",
        "ni",
        "na",
        "apples",
        "how",
        "many",
        "question",
        "answer",
        "so",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
    ]
    places = {"encoder": RECORDED / "bases" / "toy-mt5", "llm": RECORDED / "bases" / "meta-math" / "MetaMath-toy"}
    for role, place in places.items():
        shutil.copytree(place, folder / role)
        word_tokenizer(words, end_after_text=role == "encoder").save_pretrained(folder / role)
    return {role: str(folder / role) for role in places}


def system(kind, toys, **options):
    checkpoint = RECORDED / ("mindmerger" if kind == "mindmerger" else "langbridge_linear")
    return PublishedBaseline(**{"kind": kind, "checkpoint": str(checkpoint), "settings": SETTINGS, **toys, **options})


def answered(answerer, prompt, encoder_text):
    """By hand: texts one by one, with what the LLM and what the encoder reads beside."""
    found = []
    plain = LayAlignProcessor(answerer.processor.tokenizer, answerer.processor.encoder_tokenizer)
    for text in TEXTS:
        batch = plain(encoder_text.format(text=text), prompt and prompt.format(text=text))
        row = answerer.model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)[0].tolist()
        row = row[: row.index(2)] if 2 in row else row
        found.append(plain.decode(row, skip_special_tokens=True).strip())
    return found


def test_mindmergers_llm_reads_the_prompt(toys):
    own = system("mindmerger", toys)
    own.check(["sw"])
    assert own.name == "mindmerger (mindmerger)"
    answerer = own.load()
    assert answerer(TEXTS, langs=LANGS) == answered(answerer, "{text}", "{text}")
    prompted = own.load("question {text} answer")
    assert prompted.model is answerer.model
    assert prompted(TEXTS) == answered(answerer, "question {text} answer", "{text}")
    assert own.load(None)(TEXTS) == answered(answerer, None, "{text}")


def test_langbridges_encoder_reads_the_prompt(toys):
    own = system("langbridge", toys)
    own.check()
    answerer = own.load()
    assert answerer(TEXTS) == answered(answerer, None, "{text}")
    prompted = own.load("question {text} answer")
    assert prompted(TEXTS) == answered(answerer, None, "question {text} answer") != answerer(TEXTS)
    assert [len(found) for found in prompted.loglikelihoods(TEXTS, [["1", "2"]] * 3)] == [2, 2, 2]
    added = answerer.processor.encoder_tokenizer
    assert added.convert_tokens_to_ids(["\t", "\n", "\r", "\x0b", "\x0c", "  ", "   ", "    "]) == list(range(20, 28))


def test_what_a_converted_langbridge_reads(toys, tmp_path):
    """A saved model and processor do the same as the checkpoint, without options."""
    checkpoint, template = RECORDED / "langbridge_linear", "question {text} answer"
    model = load_published("langbridge", checkpoint, **toys, bases=tmp_path / "bases")
    model.save_pretrained(tmp_path / "saved")
    published_processor("langbridge", checkpoint, **toys, prompt=template).save_pretrained(tmp_path / "saved")
    again = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = LayAlignProcessor.from_pretrained(tmp_path / "saved")
    assert processor.encoder_template == template
    assert processor.prompt_template is None
    expected = system("langbridge", toys).load(template)(TEXTS)
    assert Answerer(again, processor, max_new_tokens=5)(TEXTS) == expected


def test_the_template_counts_where_an_encoder_has_a_limit(toys):
    answerer = system("langbridge", toys).load("what what what what {text}")
    answerer.model.encoder_limit = 8
    answerer.check(["is is is"])
    with pytest.raises(ValueError, match=r"texts\[0\]: got 9 tokens, the encoder takes 8"):
        answerer.check(["is is is is"])


def test_what_is_refused(toys):
    with pytest.raises(ValueError, match="kind: got 'layalign', takes 'mindmerger' or 'langbridge'"):
        system("layalign", toys)
    with pytest.raises(ValueError, match="mindmerger: its checkpoint holds no base, give encoder and llm"):
        system("mindmerger", {"llm": "x"})
    with pytest.raises(ValueError, match="checkpoint: /nowhere: no such file or folder"):
        system("mindmerger", toys, checkpoint="/nowhere").check()
    with pytest.raises(ValueError, match=r"llm: .*encoder holds MT5Model, takes a causal LM"):
        system("langbridge", toys, llm=toys["encoder"]).check()
    with pytest.raises(ValueError, match="encoder: no such folder: '/nowhere/at/all'"):
        system("mindmerger", toys, encoder="/nowhere/at/all").check()
    with pytest.raises(ValueError, match=r"prompt: got 'x', takes .* a text that contains"):
        system("langbridge", toys).load("x")
    with pytest.raises(ValueError, match="'chat' needs a chat template"):
        system("mindmerger", toys).load("chat")


def test_what_tells_a_job_from_others(toys):
    jobs = [system("mindmerger", toys), system("langbridge", toys)]
    jobs.append(system("langbridge", toys, checkpoint=str(RECORDED / "langbridge_ffn")))
    jobs.append(system("langbridge", toys, encoder_tokenizer=toys["encoder"]))
    assert len({str(job.fingerprint()) for job in jobs}) == len(jobs)
