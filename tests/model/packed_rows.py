"""Examples of different lengths end to end, and a training step on them."""

import torch

LENGTHS = [
    (6, 7, 3),
    (1, 2, 1),
    (11, 9, 2),
    (3, 12, 6),
    (6, 3, 1),
]  # of a question, its text, and how much of that is prompt


def packed(batch):
    """The same examples end to end."""
    found = {}
    for prefix in ("encoder_", ""):
        mask = batch[f"{prefix}attention_mask"].bool()
        found[f"{prefix}input_ids"] = batch[f"{prefix}input_ids"][mask][None]
        ends = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        found[f"{prefix}cu_seqlens"] = ends.to(torch.int32)
    return found | {"labels": batch["labels"][batch["attention_mask"].bool()][None]}


def step(model, batch):
    """Loss and gradients of the trained part."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for _, parameter in model.trained_parameters())]


def assert_same(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * max(1, float(other.abs().max())), rtol=0)
