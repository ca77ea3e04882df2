"""What the answers of a model are, without anything of layalign.generation."""

import pytest


@pytest.fixture(scope="session")
def answers_by_hand():
    """(model, processor, texts) -> the model's answers one by one, with nothing of the Answerer's."""

    def answer(model, processor, text, template):
        prompt = template and template.replace("{text}", text)
        (row,) = model.generate(**processor(text, prompt=prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
        ids = row.tolist()
        ids = ids[: ids.index(2)] if 2 in ids else ids
        return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def answers(model, processor, texts, template="question {text} answer"):
        return [answer(model, processor, text, template) for text in texts]

    return answers
