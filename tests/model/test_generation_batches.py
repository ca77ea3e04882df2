"""Batch size, padding and neighbours change no generated id: greedy, fp32, CPU, every family of LLMs."""

import pytest
import torch

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "gpt2", "gpt_neox"]
ENCODER_LENGTHS = [6, 1, 11, 3, 8, 2, 13, 1, 4]
PROMPT_LENGTHS = [4, 1, 9, 1, 2, 12, 5, 2, 6]
# No token twice: random LLMs fall into repeating one, after which a leak would change no id any more.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def rows():
    """Nine questions with their prompts, of very different lengths: (encoder ids, prompt ids) each."""
    generator = torch.Generator().manual_seed(16)
    return [
        (torch.randint(3, 50, (encoder,), generator=generator), torch.randint(3, 60, (prompt,), generator=generator))
        for encoder, prompt in zip(ENCODER_LENGTHS, PROMPT_LENGTHS, strict=True)
    ]


def padded(parts, side, generator, vocabulary):
    """Ids and mask (B, N) of ragged rows; what lies in the padding is random, for nothing may read it."""
    width = max(map(len, parts))
    ids = torch.randint(3, vocabulary, (len(parts), width), generator=generator)
    mask = torch.zeros(len(parts), width, dtype=torch.long)
    for row, part in enumerate(parts):
        place = slice(width - len(part), None) if side == "left" else slice(len(part))
        ids[row, place], mask[row, place] = part, 1
    return ids, mask


def collated(rows, side, generator):
    encoder_ids, encoder_mask = padded([encoder for encoder, _ in rows], side, generator, 50)
    ids, mask = padded([prompt for _, prompt in rows], side, generator, 60)
    return {
        "encoder_input_ids": encoder_ids,
        "encoder_attention_mask": encoder_mask,
        "input_ids": ids,
        "attention_mask": mask,
    }


def answers_alone(model, rows):
    """Ids (9, new) of every row generated without neighbour, padding or mask, and the smallest lead of a chosen token over the next."""
    answers, leads = [], []
    for encoder, prompt in rows:
        out = model.generate(
            encoder_input_ids=encoder[None],
            input_ids=prompt[None],
            **GREEDY,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers.append(out.sequences[0])
        first, second = torch.stack(out.scores).topk(2).values.unbind(-1)
        leads.append((first - second).min())
    return torch.stack(answers), min(leads)


@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`")
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_never_changes_answers(family, lively, rows):
    model = lively(family)
    expected, lead = answers_alone(model, rows)
    assert lead > 1e-4, "rounding, some 1e-6 for these logits, could choose another token"
    assert expected.unique(dim=0).shape[0] == len(rows)
    generator = torch.Generator().manual_seed(17)
    for side in ("left", "right"):
        for size in range(1, len(rows) + 1):
            for cache in ("dynamic", "static"):
                order = torch.randperm(len(rows), generator=generator)[:size]
                batch = collated([rows[index] for index in order], side, generator)
                ids = model.generate(**batch, **GREEDY, cache_implementation=cache)
                assert torch.equal(ids, expected[order]), (side, cache, order.tolist())


@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`")
def test_a_training_batchs_targets_are_not_read(lively, rows):
    """`generate` of a batch whose rows have targets of different lengths gives what it gives without."""
    model = lively("llama")
    expected, _ = answers_alone(model, rows)
    generator = torch.Generator().manual_seed(18)
    targets = [torch.randint(3, 60, (length,), generator=generator) for length in range(1, 1 + len(rows))]
    whole = [(encoder, torch.cat([prompt, target])) for (encoder, prompt), target in zip(rows, targets, strict=True)]
    scored = [
        torch.cat([torch.full_like(prompt, -100), target]) for (_, prompt), target in zip(rows, targets, strict=True)
    ]
    for side in ("left", "right"):
        batch = collated(whole, side, generator)
        labels, mask = padded(scored, side, generator, 60)
        labels = labels.masked_fill(mask == 0, -100)
        assert torch.equal(model.generate(**batch, labels=labels, **GREEDY), expected), side
    (encoder, ids), labels = whole[0], scored[0]
    alone = {"encoder_input_ids": encoder[None], "input_ids": ids[None]}
    assert torch.equal(model.generate(**alone, labels=labels[None], **GREEDY), expected[:1])
    with pytest.raises(ValueError, match="labels must have the shape of input_ids"):
        model.generate(**alone, labels=labels[None, 1:], **GREEDY)
