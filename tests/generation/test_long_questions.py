"""Questions longer than an encoder with learned positions can read: refused by name before any is answered, or cut when asked."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel

from layalign import LayAlignForConditionalGeneration, LayAlignPipeline, LayAlignProcessor
from layalign.evaluation.run import evaluate
from layalign.evaluation.settings import GenerationSettings
from layalign.generation.jobs import generate_texts
from layalign.generation.texts import Answerer
from layalign.loading import load_model

POSITIONS = 12
SHORT, LONG = "what is 3 plus 4", " ".join(["what is 3 plus 4"] * 4)
MESSAGE = rf"got 21 tokens, the encoder takes {POSITIONS}; encoder_max_length={POSITIONS} cuts it"


@pytest.fixture(scope="module")
def folder(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("short")
    processor = LayAlignProcessor.from_bases(bases / "encoder", bases / "llm", "question {text} answer")
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(processor.encoder_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    BertModel(config).save_pretrained(root / "encoder")
    model = LayAlignForConditionalGeneration.from_bases(root / "encoder", str(bases / "llm"))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    return root / "model"


def test_a_long_text_is_refused_by_its_place_and_cut_when_asked(folder):
    model, processor = load_model(folder, device="cpu")
    asked = []
    model.register_forward_pre_hook(lambda *_: asked.append(1))
    with pytest.raises(ValueError, match=rf"texts\[1\]: {MESSAGE}"):
        Answerer(model, processor, max_new_tokens=3, batch_size=1)([SHORT, LONG])
    with pytest.raises(ValueError, match=MESSAGE):
        LayAlignPipeline(model, processor)(LONG, max_new_tokens=3)
    with pytest.raises(ValueError, match=rf"encoder_max_length: got 13, the encoder takes {POSITIONS}"):
        Answerer(model, processor, encoder_max_length=13)
    with pytest.raises(ValueError, match="encoder_max_length: got 0, takes a positive int"):
        Answerer(model, processor, encoder_max_length=0)
    assert not asked
    # The tokenizer keeps its end of sequence when it cuts: 11 words are left.
    cut = Answerer(model, processor, max_new_tokens=3, prompt=None, encoder_max_length=POSITIONS)([SHORT, LONG])
    whole = Answerer(model, processor, max_new_tokens=3, prompt=None)([SHORT, " ".join(LONG.split()[:11])])
    assert cut == whole
    piped = LayAlignPipeline(model, processor)(LONG, max_new_tokens=3, prompt=None, encoder_max_length=POSITIONS)
    assert piped == [{"generated_text": cut[1]}]


def test_a_file_with_a_long_line_names_it_and_goes_on_when_it_may_be_cut(folder, tmp_path):
    lines, output = tmp_path / "lines.txt", tmp_path / "out.jsonl"
    lines.write_text(f"{SHORT}\n\n{LONG}\n")
    settings = {"file": lines, "max_new_tokens": 3, "device": "cpu"}
    for place in (output, None):
        with pytest.raises(ValueError, match=f"line 3: {MESSAGE}"):
            generate_texts(folder, output=place, **settings)
    records = generate_texts(folder, output=output, encoder_max_length=POSITIONS, **settings)
    assert [record["line"] for record in records] == [1, 3]


def test_an_evaluation_with_a_long_question_names_it(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "mgsm_sw.tsv").write_text(f"{SHORT}\t7\n{LONG}\t7\n")
    settings = GenerationSettings(max_new_tokens=3, device="cpu")
    call = {"data": data, "output": tmp_path / "out", "progress": False}
    with pytest.raises(ValueError, match=f"mgsm, sw, question 1: {MESSAGE}"):
        evaluate(folder, ["mgsm"], settings=settings, **call)
    results = evaluate(folder, ["mgsm"], settings=replace(settings, encoder_max_length=POSITIONS), **call)
    assert results["tasks"]["mgsm"]["counts"] == {"sw": 2}
