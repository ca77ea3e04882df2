"""Whether meaning crosses, or style alone."""

import torch


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
