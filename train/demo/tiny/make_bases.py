"""Trains the two tiny bases of the demo: `python -m layalign.train.demo.tiny.make_bases [--output FOLDER] [--only NAME]`.

tiny_encoder (mT5) learned to gloss: to tell, for each piece of a text in any language of the demo, the English words it
stands for. tiny_llm (Llama) learned English only. Neither ever saw the other. Texts: corpus.py, glosses.py.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from layalign.loading import SHIPPED
from layalign.train.demo.problems import HELD_OUT, TINY
from layalign.train.demo.tiny.corpus import english, multilingual, sample_texts
from layalign.train.demo.tiny.glosses import glosses, part_of
from layalign.train.demo.tiny.vocabulary import encoder_tokenizer, llm_tokenizer

IGNORED = -100


def batches(pairs: Iterator[tuple], size: int) -> Iterator[list[tuple]]:
    """Batches of pairs of similar length: pools of 16 batches are sorted, then handed out in a mixed order."""
    order = torch.Generator().manual_seed(0)
    while True:
        pool = sorted(itertools.islice(pairs, size * 16), key=lambda pair: len(pair[0]) + len(pair[1]))
        for i in torch.randperm(16, generator=order).tolist():
            yield pool[i * size : (i + 1) * size]


def padded(rows: Sequence[list[int]], value: int) -> Tensor:
    """(rows, longest row) int64, filled up on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def fit(name: str, model: nn.Module, loss_of: Callable[[], Tensor], steps: int, learning_rate: float) -> None:
    """AdamW with warm-up and a cosine; the bar shows the mean loss of the last 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    losses: list[float] = []
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for _ in bar:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)


def make_encoder(steps: int, batch_size: int, seed: int) -> tuple[MT5EncoderModel, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    sample = list(itertools.islice(multilingual("vocabulary"), 16000))
    tokenizer = encoder_tokenizer([part_of(*part) for part in sample], 1600)
    found = {word for part in sample[:2000] for words in glosses(*part, tokenizer)[1] for word in words}
    # "" is the gloss of a piece that stands for no English word of its own.
    vocabulary = {word: place for place, word in enumerate(["", *sorted(found)])}
    encoder = MT5EncoderModel(
        MT5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=48,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    head = nn.Linear(encoder.config.d_model, len(vocabulary))

    def encoded() -> Iterator[tuple[list[int], list[list[int]]]]:
        for part in multilingual(seed):
            ids, words = glosses(*part, tokenizer)
            yield ids, [[vocabulary[word] for word in found or [""]] for found in words]

    stream = batches(encoded(), batch_size)

    def loss_of() -> Tensor:
        ids, words = zip(*next(stream), strict=True)
        mask = padded([[1] * len(row) for row in ids], 0)
        states = encoder(input_ids=padded(ids, 0), attention_mask=mask).last_hidden_state
        return gloss_loss(head(states[mask.bool()]), [found for row in words for found in row])

    fit("tiny_encoder", nn.ModuleList([encoder, head]), loss_of, steps, 2e-3)
    check_glosses(encoder, head, tokenizer, vocabulary)
    return encoder, tokenizer


def gloss_loss(logits: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Cross-entropy of logits (N, words) against the words of each of N pieces, equally shared where there are several."""
    rows = torch.tensor([row for row, found in enumerate(words) for _ in found])
    shares = torch.tensor([1 / len(found) for found in words for _ in found])
    columns = torch.tensor([word for found in words for word in found])
    return -(shares * logits.log_softmax(-1)[rows, columns]).sum() / len(words)


@torch.no_grad()
def check_glosses(
    encoder: MT5EncoderModel, head: nn.Linear, tokenizer: PreTrainedTokenizerFast, vocabulary: dict[str, int]
) -> None:
    """Prints how many pieces of held-out problems get a right gloss, by language."""
    chosen = list(itertools.islice(TINY.problems("glosses", HELD_OUT), 90))
    for language in TINY.languages:
        right = []
        for problem in chosen:
            ids, words = glosses(problem, range(len(problem.clauses)), language, tokenizer)
            told = head(encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]).argmax(-1).tolist()
            right += [
                place in [vocabulary[word] for word in found or [""]] for place, found in zip(told, words, strict=True)
            ]
        print(
            f"{language}: {100 * sum(right) / len(right):.2f} % of {len(right)} pieces of held-out problems glossed right"
        )


def causal_model(words: int, *, layers: int, pad: int, bos: int, eos: int) -> LlamaForCausalLM:
    """A small Llama. Its embeddings have std 1, as trained LLMs' are large beside what their layers add at first."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    return model


def make_llm(steps: int, batch_size: int, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    tokenizer = llm_tokenizer(text.replace("¤", "") for text in sample_texts(16000, seed))
    model = causal_model(
        len(tokenizer),
        layers=4,
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
    )
    embedding = model.get_input_embeddings()

    def encoded() -> Iterator[tuple[list[int], list[int]]]:
        for read, write in english(seed):
            yield (
                tokenizer(read).input_ids,
                [*tokenizer(write, add_special_tokens=False).input_ids, tokenizer.eos_token_id],
            )

    stream = batches(encoded(), batch_size)

    def loss_of() -> Tensor:
        rows = next(stream)
        ids = padded([read + write for read, write in rows], tokenizer.pad_token_id)
        labels = padded([[IGNORED] * len(read) + write for read, write in rows], IGNORED)
        # Noise of a random strength on what is read: a reader of words that are never quite clean.
        noise = torch.rand(len(rows), 1, 1) * 0.5 * (labels == IGNORED).unsqueeze(-1)
        states = embedding(ids)
        return model(inputs_embeds=states + noise * torch.randn_like(states), labels=labels).loss

    fit("tiny_llm", model, loss_of, steps, 2e-3)
    return model, tokenizer


def write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stores the weights in fp16; the configuration says float32, which is what they are read as."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=SHIPPED)
    parser.add_argument("--only", choices=("tiny_encoder", "tiny_llm"))
    parser.add_argument("--steps", type=int, help="default: 2000 for tiny_encoder, 3000 for tiny_llm")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, make, steps in (("tiny_encoder", make_encoder, 2000), ("tiny_llm", make_llm, 3000)):
        if arguments.only in (None, name):
            started = time.perf_counter()
            write(arguments.output / name, *make(arguments.steps or steps, arguments.batch_size, arguments.seed))
            print(f"{name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
