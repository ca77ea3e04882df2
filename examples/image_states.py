"""An image encoder joined to an LLM by `layalign.fuse`: python examples/image_states.py

Both are tiny and frozen, with random weights, so that this runs anywhere in seconds; real ones are loaded by `from_pretrained` and the
rest stays. What is trained, a projection and gates, learns to say in which quarter of an image the light is.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import layalign

WORDS = ["<pad>", "<s>", "</s>", "where", "?", "northwest", "northeast", "southwest", "southeast"]
QUESTION = [1, 3, 4]


def bases() -> tuple[ViTModel, LlamaForCausalLM]:
    """A vision transformer and an LLM."""
    torch.manual_seed(0)
    vision = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    text.initializer_range, text.intermediate_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = (
        0.1,
        128,
        0,
        1,
        2,
    )
    return ViTModel(vision, add_pooling_layer=False).eval(), LlamaForCausalLM(text).eval()


def images(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (count, 3, 16, 16) with a light in one quarter, and which (count,)."""
    quarter = torch.randint(4, (count,), generator=generator)
    pixels = torch.randn(count, 3, 16, 16, generator=generator) * 0.3
    for row, place in enumerate(quarter.tolist()):
        top, left = place // 2 * 8, place % 2 * 8
        pixels[row, :, top : top + 8, left : left + 8] += 1.5
    return pixels, quarter


def main(steps: int = 120) -> float:
    """Train, ask about new images, take the LLM apart again. -> the share of right answers."""
    vit, llm = bases()
    untouched = llm(torch.tensor([QUESTION])).logits
    fusion = layalign.fuse(llm, cross_size=vit.config.hidden_size, gate="head")
    print(f"{sum(own.numel() for own in fusion.parameters())} trained parameters")
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        pixels, quarter = images(32, generator)
        with torch.no_grad():
            states = vit(pixels).last_hidden_state  # (B, T, De)
        ids = torch.cat([torch.tensor([QUESTION]).expand(32, -1), quarter[:, None] + 5], dim=1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(QUESTION), -100)
        loss = llm(ids, labels=labels, cross_states=states).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            print(f"step {step}: loss {loss.item():.2f}")

    pixels, quarter = images(64, generator)
    ids = torch.tensor([QUESTION]).expand(64, -1)
    with torch.no_grad():
        states = vit(pixels).last_hidden_state
    answers = llm.generate(ids, cross_states=states, max_new_tokens=1, do_sample=False)[:, -1]
    right = (answers == quarter + 5).float().mean().item()
    print(f"{right:.0%} right; the first light is in the {WORDS[int(answers[0])]}")
    layalign.unfuse(llm)
    assert torch.equal(llm(torch.tensor([QUESTION])).logits, untouched)
    return right


if __name__ == "__main__":
    main()
