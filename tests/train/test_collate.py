import logging

import numpy as np
import pytest
import torch

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.train.data.collate import Collator
from layalign.train.data.encoding import RecordEncoder, encode_records
from layalign.train.data.sources import stream_sources
from layalign.train.prompts import fill_prompt
from layalign.train.stage_recipe import StageRecipe


@pytest.fixture
def processor(bases):
    return LayAlignProcessor.from_bases(**bases)


def batches(processor, records, with_prompt, **settings):
    stage = StageRecipe(data={"records": records}, prompt="answer : {source}", **settings)
    data = encode_records(stream_sources(stage.data, None, print), RecordEncoder(processor, stage, with_prompt))
    ours = Collator()([data[index] for index in range(len(records))])
    prompts = [fill_prompt(stage.prompt, record) for record in records] if with_prompt else None
    sources, targets = [record["source"] for record in records], [record["target"] for record in records]
    return ours, processor(sources, prompt=prompts, target=targets), data


def rows(batch, key, mask):
    return [ids[kept].tolist() for ids, kept in zip(batch[key], batch[mask].bool(), strict=True)]


@pytest.mark.parametrize("with_prompt", [False, True])
def test_batches_hold_what_the_processor_makes(processor, records, bases, with_prompt):
    records = records * 120  # more than one chunk
    ours, theirs, _ = batches(processor, records, with_prompt)
    assert rows(ours, "encoder_input_ids", "encoder_attention_mask") == rows(
        theirs, "encoder_input_ids", "encoder_attention_mask"
    )
    for key in ("input_ids", "labels"):
        assert rows(ours, key, "attention_mask") == rows(theirs, key, "attention_mask")
    assert ((ours["labels"] == -100) | (ours["attention_mask"] == 1)).all()
    model = LayAlignForConditionalGeneration.from_bases(**bases).eval()
    few = [{key: value[:8] for key, value in batch.items()} for batch in (ours, dict(theirs))]
    with torch.no_grad():
        torch.testing.assert_close(model(**few[0]).loss, model(**few[1]).loss, rtol=1e-5, atol=0)


def test_prompt_target_and_source_are_cut_to_their_own_lengths(processor, records, caplog):
    with caplog.at_level(logging.WARNING):
        ours, full, _ = batches(processor, records, True, source_max_length=3, target_max_length=2)
    for index in range(len(records)):
        want_prompt = full["input_ids"][index][(full["labels"][index] == -100) & full["attention_mask"][index].bool()]
        want_target = full["labels"][index][full["labels"][index] != -100]
        labels = ours["labels"][index]
        real = ours["attention_mask"][index].bool()
        assert ours["input_ids"][index][real & (labels == -100)].tolist() == want_prompt[-3:].tolist()
        assert labels[labels != -100].tolist() == want_target[:2].tolist()
    assert ours["encoder_attention_mask"].sum(1).max() == 3
    # The encoder's tokenizer ends every source, a cut one too.
    assert all(row[-1] == 2 for row in rows(ours, "encoder_input_ids", "encoder_attention_mask"))
    assert "10 of 10 targets cut to 2 tokens" in caplog.text
    assert "sources cut to 3 tokens" in caplog.text


def test_prompts_name_the_language(records):
    assert fill_prompt("from {language} : {source}", {"source": "moja {x}", "lang": "sw"}) == "from Swahili : moja {x}"
    with pytest.raises(ValueError, match="no English name known for language 'xx'"):
        fill_prompt("{language}", {"source": "a", "lang": "xx"})


def test_the_digest_tells_other_data(processor, records):
    digest = batches(processor, records, True)[2].digest()
    assert batches(processor, records, True)[2].digest() == digest
    assert batches(processor, records[1:], True)[2].digest() != digest
    assert batches(processor, records, False)[2].digest() != digest


def test_subsets_and_languages(processor, records):
    for place, record in enumerate(records):
        record["lang"] = ("sw", "de", "")[place % 3]
    data = batches(processor, records, True)[2]
    assert [data.language_names[place] for place in data.languages] == [record["lang"] for record in records]
    some = data.subset(np.array([7, 2, 5]))
    assert len(some) == 3
    for place, index in enumerate((7, 2, 5)):
        assert all(np.array_equal(one, other) for one, other in zip(some[place], data[index], strict=True))
        assert some.lengths[place] == data.lengths[index]
        assert some.language_names[some.languages[place]] == records[index]["lang"]
    assert {name: places.tolist() for name, places in data.by_language().items()} == {
        "unknown": [2, 5, 8],
        "de": [1, 4, 7],
        "sw": [0, 3, 6, 9],
    }
    assert list(some.by_language()) == ["unknown", "de"]
    digests = [data.digest(), some.digest(), data.subset(np.array([7, 5, 2])).digest()]
    assert len(set(digests)) == 3
    assert data.subset(np.array([7, 2, 5])).digest() == digests[1]


def test_a_language_without_a_name_or_token_is_told_with_its_place(processor, records):
    records[4]["lang"] = "xx"
    stage = StageRecipe(data={"records": records}, prompt="{language} : {source}")
    with pytest.raises(ValueError, match=r"^records\[4\]: no English name known for language 'xx'"):
        encode_records(stream_sources(stage.data, None, print), RecordEncoder(processor, stage, True))
