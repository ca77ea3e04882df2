"""Two measures of whether meaning crosses: retrieval by the encoder, and the loss with swapped encoder inputs."""

import torch
from safetensors.torch import load_file

from layalign.saving import load_trained_part


def retrieval_at_1(encoder, tokenizer, questions, batch_size=16):
    """Per cent of questions whose nearest English question, by the encoder's mean-pooled last state, is their own.

    questions: {lang: list of str}, question i the same in every language, "en" among them. The "query: " in front is
    what multilingual-e5 was trained with. Returns {lang: per cent} without English.
    """
    pooled = {lang: _pooled(encoder, tokenizer, texts, batch_size) for lang, texts in questions.items()}
    english = pooled.pop("en")
    scores = {}
    for lang, states in pooled.items():
        nearest = (states @ english.T).argmax(1).cpu()
        scores[lang] = 100 * (nearest == torch.arange(len(nearest))).float().mean().item()
    return scores


@torch.inference_mode()
def _pooled(encoder, tokenizer, texts, batch_size):
    """(N, De) unit vectors."""
    rows = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(texts), batch_size):
        places = order[start : start + batch_size]
        part = [f"query: {texts[place]}" for place in places]
        batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(encoder.device)
        state = encoder(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        for place, row in zip(places, (state * mask).sum(1) / mask.sum(1), strict=True):
            rows[place] = row
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@torch.inference_mode()
def loss_against_shuffled(model, processor, pairs, batch_size=8, source_max_length=128):
    """Mean loss of the target tokens with each row's own encoder input, and with its neighbour's.

    pairs: list of (text for the encoder, target text), at least 2, targets different. Returns (true, shuffled), in nats
    a token.
    """
    losses, tokens = [0.0, 0.0], 0
    parts = max(1, len(pairs) // batch_size)
    for part in (pairs[place::parts] for place in range(parts)):
        sources, targets = [source for source, _ in part], [target for _, target in part]
        batch = processor(sources, prompt=None, target=targets, encoder_max_length=source_max_length).to(model.device)
        count = int((batch["labels"] != -100).sum())
        tokens += count
        losses[0] += model(**batch).loss.item() * count
        for name in ("encoder_input_ids", "encoder_attention_mask"):
            batch[name] = batch[name].roll(1, 0)
        losses[1] += model(**batch).loss.item() * count
    return losses[0] / tokens, losses[1] / tokens


def losses_by_stage(model, processor, translation_weights, pairs):
    """`loss_against_shuffled` by language, of the model as it was after its translation stage and as it is.

    translation_weights: the trained part after that stage, a safetensors file; the model's own weights are put back.
    pairs: {stage: {name: {lang: pairs}}}. Returns {"stage: name": {"true": {lang: loss}, "shuffled": {lang: loss}}};
    a language with a single pair is left out.
    """
    trained = {name: value.clone() for name, value in model.trained_state_dict().items()}
    results = {}
    load_trained_part(model, load_file(translation_weights), str(translation_weights))
    for stage in ("translation", "task"):
        if stage == "task":
            load_trained_part(model, trained, "the trained model")
        for name, by_language in pairs[stage].items():
            losses = {
                lang: loss_against_shuffled(model, processor, rows)
                for lang, rows in by_language.items()
                if len(rows) > 1
            }
            results[f"{stage}: {name}"] = {
                kind: {lang: found[place] for lang, found in losses.items()}
                for place, kind in enumerate(("true", "shuffled"))
            }
    return results
