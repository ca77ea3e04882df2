"""Retrieved documents beside a question, by `layalign.fuse`: python examples/retrieved_documents.py

An encoder reads each document alone, once; what the LLM gets is their states in one row, padding hidden by a mask. So a store of
documents can keep states in place of texts, and the question stays as short as it is. Encoder and LLM are tiny and frozen, with
random weights; what is trained learns to find the word that the documents say about the question's topic.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import layalign

TOPICS, ANSWERS = range(4, 12), range(12, 20)  # of a vocabulary of 20 words


def bases() -> tuple[BertModel, LlamaForCausalLM]:
    """An encoder and an LLM."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    encoder = BertConfig(hidden_size=48, initializer_range=0.2, **sizes)
    text = LlamaConfig(hidden_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1, **sizes)
    return BertModel(encoder, add_pooling_layer=False).eval(), LlamaForCausalLM(text).eval()


class Store:
    """Documents by topic, of 2 to 5 words, kept as states.

    Args:
        encoder: what reads them.
        facts: the answer to each topic.
        generator: for the order of their words.
    """

    def __init__(self, encoder: BertModel, facts: dict[int, int], generator: torch.Generator):
        self.states = {}
        for topic, answer in facts.items():
            length = int(torch.randint(1, 5, (1,), generator=generator))
            document = torch.tensor([[topic] + [answer] * length])
            with torch.no_grad():
                self.states[topic] = encoder(document).last_hidden_state[0]  # (t, De)

    def retrieve(self, topics: list[int], others: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, T, De) and mask (B, T) of two documents for each question: the topic's, and another, as searches find them too."""
        rows = [
            torch.cat([self.states[topic], self.states[other]]) for topic, other in zip(topics, others, strict=True)
        ]
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return states, torch.arange(states.shape[1]) < lengths[:, None]


def facts(generator: torch.Generator) -> dict[int, int]:
    """An answer for each topic, drawn."""
    return {topic: ANSWERS[int(torch.randint(len(ANSWERS), (1,), generator=generator))] for topic in TOPICS}


def batch(store: Store, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four questions (B, 2) on every topic, with the states and mask of its documents."""
    topics = list(TOPICS) * 4
    others = [topics[int(index)] for index in torch.randint(len(topics), (len(topics),), generator=generator)]
    ids = torch.tensor([[1, topic] for topic in topics])
    return ids, *store.retrieve(topics, others)


def answers_to(ids: torch.Tensor, known: dict[int, int]) -> torch.Tensor:
    """What is right (B,)."""
    return torch.tensor([known[topic] for topic in ids[:, 1].tolist()])


def main(steps: int = 300) -> float:
    """Train on stores of drawn facts, then ask about new ones. -> the share of right answers."""
    encoder, llm = bases()
    fusion = layalign.fuse(llm, cross_size=48, gate="head")
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        known = facts(generator)
        ids, states, mask = batch(Store(encoder, known, generator), generator)
        full = torch.cat([ids, answers_to(ids, known)[:, None]], dim=1)
        labels = full.masked_fill(torch.arange(3) < 2, -100)
        loss = llm(full, labels=labels, cross_states=states, cross_mask=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f}")
    right = []
    for _ in range(8):
        known = facts(generator)
        ids, states, mask = batch(Store(encoder, known, generator), generator)
        answers = llm.generate(ids, cross_states=states, cross_mask=mask, max_new_tokens=1, do_sample=False)[:, -1]
        right.append((answers == answers_to(ids, known)).float().mean().item())
    share = sum(right) / len(right)
    print(f"{share:.0%} right on facts that were never trained")
    return share


if __name__ == "__main__":
    main()
