"""Encoders that are told the language of what they read: NLLB's and mBART's tokenizers, in the processor, training and answers."""

import sys
import threading

import pytest
import torch
from transformers import M2M100Config, MBart50Tokenizer, NllbTokenizer
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Model

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.generation.texts import Answerer
from layalign.languages import language_code
from layalign.source_languages import source_code, takes_source_language
from tests.tiny_models import word_tokenizer

LETTERS = "abc"


@pytest.fixture(scope="module")
def nllb():
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    merges = [("▁", letter) for letter in LETTERS]
    return NllbTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, merges=merges)


@pytest.fixture
def processor(nllb):
    return LayAlignProcessor(word_tokenizer(LETTERS, end_after_text=False), nllb)


def tokens(processor, batch):
    tokenizer = processor.encoder_tokenizer
    return [tokenizer.convert_ids_to_tokens(row[row != 1].tolist()) for row in batch["encoder_input_ids"]]


def test_codes(nllb):
    assert takes_source_language(nllb)
    codes = [source_code(nllb, lang) for lang in ("sw", "Swahili", "swh_Latn", "zh", "yue_Hant")]
    assert codes == ["swh_Latn", "swh_Latn", "swh_Latn", "zho_Hans", "yue_Hant"]
    mbart = MBart50Tokenizer(vocab=[(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>", "▁a")])
    assert [source_code(mbart, lang) for lang in ("sw", "th", "de_DE")] == ["sw_KE", "th_TH", "de_DE"]
    # As records have them.
    written = ("yor_Latn", "zho_Hant", "kas_Deva", "eng_Latn")
    assert [source_code(nllb, language_code(lang)) for lang in written] == [*written]
    assert [source_code(mbart, language_code(lang)) for lang in ("sw_KE", "zh_CN")] == ["sw_KE", "zh_CN"]
    assert not takes_source_language(word_tokenizer("a", end_after_text=True))
    for tokenizer, lang in ((nllb, "xx"), (mbart, "Klingon")):
        with pytest.raises(ValueError, match=f"'{lang}' is no language of this encoder's .*Tokenizer, which has a"):
            source_code(tokenizer, lang)


def test_each_text_gets_its_own(processor, nllb):
    batch = processor(["a b", "c", "b b b", "a"], lang=["sw", "th", "sw", "English"])
    assert tokens(processor, batch) == [
        ["swh_Latn", "▁a", "▁b", "</s>"],
        ["tha_Thai", "▁c", "</s>"],
        ["swh_Latn", "▁b", "▁b", "▁b", "</s>"],
        ["eng_Latn", "▁a", "</s>"],
    ]
    assert batch["encoder_attention_mask"].sum(1).tolist() == [4, 3, 5, 3]
    assert nllb.src_lang == "eng_Latn", "the tokenizer is left as it was"
    assert tokens(processor, processor(["a", "b"], lang="de"))[1] == ["deu_Latn", "▁b", "</s>"]
    assert tokens(processor, processor("a"))[0][0] == "eng_Latn", "without one its own"
    short = processor(["a b c", "a"], lang=["sw", "th"], encoder_max_length=3)
    assert tokens(processor, short)[0] == ["swh_Latn", "▁a", "</s>"]


def test_what_is_refused(processor, nllb):
    with pytest.raises(ValueError, match="'xx' is no language"):
        processor(["a", "b"], lang=["sw", "xx"])
    with pytest.raises(ValueError, match="lang has 1 texts for 2 questions"):
        processor(["a", "b"], lang=["sw"])
    assert nllb.src_lang == "eng_Latn"


def test_others_do_not_look_at_it(loaded):
    _, processor = loaded
    with_it, without = processor("what is 3", lang="xx"), processor("what is 3")
    assert torch.equal(with_it["encoder_input_ids"], without["encoder_input_ids"])


@pytest.fixture(scope="module")
def model(nllb, bases):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    encoder = M2M100Model(M2M100Config(vocab_size=len(nllb), pad_token_id=1, init_std=0.5, **sizes, **heads))
    model = LayAlignForConditionalGeneration.from_bases(encoder, str(bases / "llm")).eval()
    for name, parameter in model.trained_parameters():
        if "gate" in name:
            parameter.data.fill_(0.7)
    return model


def test_answers_are_told_it(model, nllb, bases):
    from transformers import AutoTokenizer

    processor = LayAlignProcessor(AutoTokenizer.from_pretrained(str(bases / "llm")), nllb)
    answerer = Answerer(model, processor, batch_size=2, max_new_tokens=4)
    texts, langs = ["a b", "c", "b b b"], ["sw", "th", "sw"]
    likelihoods = answerer.loglikelihoods(texts, [["7 so"]] * 3, langs)
    for place, (text, lang) in enumerate(zip(texts, langs, strict=True)):
        alone = answerer.loglikelihoods([text], [["7 so"]], [lang])[0]
        assert likelihoods[place] == pytest.approx(alone, abs=1e-4)
        other = answerer.loglikelihoods([text], [["7 so"]], ["ja"])[0]
        assert abs(alone[0] - other[0]) > 1e-3, "the encoder sees another language"
    with pytest.raises(ValueError, match="'xx' is no language"):
        answerer.check(texts, langs=["sw", "xx", "th"])


def test_training_records_are_told_it(processor, nllb):
    from layalign.train.data.encoding import RecordEncoder, encode_records
    from layalign.train.data.sources import stream_sources
    from layalign.train.stage_recipe import StageRecipe

    records = [{"source": "a b", "target": "c", "lang": "sw"}, {"source": "a", "target": "b", "lang": "th"}]
    stage = StageRecipe(data=[{"format": "records", "records": records}])
    rows = encode_records(stream_sources(stage.data, None, print), RecordEncoder(processor, stage, with_prompt=False))
    assert nllb.convert_ids_to_tokens(rows[0].question.tolist()) == ["swh_Latn", "▁a", "▁b", "</s>"]
    assert nllb.convert_ids_to_tokens(rows[1].question.tolist())[0] == "tha_Thai"


def test_threads_may_ask_in_languages_of_their_own(processor, nllb):
    """The tokenizer keeps its language in itself."""
    before = nllb.src_lang
    expected = {lang: processor(["a b"] * 4, lang=lang)["encoder_input_ids"] for lang in ("sw", "th", "ja", "en")}
    wrong = []

    def ask(lang):
        for _ in range(50):
            found = processor(["a b"] * 4, lang=lang)["encoder_input_ids"]
            wrong.extend([] if torch.equal(found, expected[lang]) else [lang])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(lang,)) for lang in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and nllb.src_lang == before
