"""Mean-pooled states of a model's encoder and LLM, and how much the cross-attention adds in each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AttentionInterface

from layalign.fusion import NAME, fused_attention
from layalign.prompts import DEFAULT_PROMPT, chosen_prompt, fill_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from layalign.model import LayAlignForConditionalGeneration
    from layalign.processor import LayAlignProcessor


class States(NamedTuple):
    """Of N texts, fp32 on the CPU, each the mean over a text's real tokens."""

    encoder: torch.Tensor  # (E, N, De): the embeddings, then every layer
    llm: torch.Tensor  # (N, Dl): the LLM's last layer, behind its norm
    ratio: torch.Tensor | None  # (L, N): |gate x cross-attention| / |self-attention|; None without an aligner


def joined_states(
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    encoder_max_length: int | None = None,
    progress: str | None = None,
    prompt: str | None = DEFAULT_PROMPT,
    lang: str | None = None,
) -> States:
    """States where the model has read each text and not answered yet: `[bos][soft prompts][boundary][prompt]`.

    Args:
        model, processor: LayAlign's.
        texts: N texts; their states come in this order.
        batch_size: texts at a time, longest first.
        encoder_max_length: texts are cut to so many of the encoder's tokens; None for all.
        progress: title of a bar, None for none.
        prompt: what the LLM reads, by name or as a template, see `layalign.prompts.chosen_prompt`.
        lang: the texts' language, for encoders and prompts that are told it.
    """
    template = chosen_prompt(prompt, processor.prompt_template, processor.tokenizer)

    def read(chosen):
        langs = lang and [lang] * len(chosen)
        prompts = None if template is None else fill_prompts(template, chosen, langs)
        batch = processor(chosen, prompts, lang=langs, encoder_max_length=encoder_max_length).to(model.device)
        with _calls(model.encoder) as encoder, _calls(model.llm) as llm, branch_ratios() as ratios:
            model(**batch, output_hidden_states=True, logits_to_keep=1)
        (encoder_mask, encoder_states), (mask, states) = encoder[0], llm[0]
        encoded = torch.stack([_mean(state, encoder_mask) for state in encoder_states])
        ratio = torch.stack([ratios[layer] for layer in model.config.fused_layers]) if ratios else None
        return encoded, _mean(states[-1], mask), ratio

    encoder, llm, ratio = _in_batches(read, texts, batch_size, progress)
    return States(encoder, llm, None if ratio is None else ratio.squeeze(-1))


def llm_states(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    progress: str | None = None,
    template: str | None = None,
    lang: str | None = None,
) -> torch.Tensor:
    """The states (N, Dl) of a causal LLM that reads the texts itself, behind its beginning-of-sequence token if it has one.

    Args:
        llm, tokenizer: the LLM and its tokenizer.
        texts: N texts.
        batch_size, progress: as of `joined_states`.
        template: what it reads of each, with {text} and perhaps {language}; None: the text alone.
        lang: the texts' language, for templates that name it.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def read(chosen):
        filled = chosen if template is None else fill_prompts(template, chosen, lang and [lang] * len(chosen))
        rows = [torch.tensor(bos + tokenizer(text, add_special_tokens=False)["input_ids"]) for text in filled]
        ids = pad_sequence(rows, batch_first=True).to(llm.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(llm.device)
        out = llm(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return (_mean(out.hidden_states[-1], mask),)

    return _in_batches(read, texts, batch_size, progress)[0]


def _in_batches(
    read: Callable[[list[str]], Sequence[torch.Tensor | None]],
    texts: Sequence[str],
    batch_size: int,
    progress: str | None,
) -> list[Any]:
    """The tensors (..., B, D) that `read` gives of a list of texts, put together in the texts' order, longest read first."""
    longest_first = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    batches = []
    with tqdm(total=len(texts), desc=progress, unit="text", disable=progress is None) as bar, torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            chosen = [texts[place] for place in longest_first[start : start + batch_size]]
            batches.append([None if part is None else part.float().cpu() for part in read(chosen)])
            bar.update(len(chosen))
    back = torch.tensor(longest_first).argsort()
    columns = zip(*batches, strict=True)
    return [None if parts[0] is None else torch.cat(parts, -2)[..., back, :] for parts in columns]


@contextmanager
def branch_ratios() -> Iterator[dict[int, torch.Tensor]]:
    """{layer index: (B, 1)}: |gate x cross-attention| / |self-attention| before the output projection, the mean over real tokens,
    of the forward call made meanwhile, which computes self-attention twice. For one model at a time: the attention function that
    all models share is another one meanwhile.
    """
    ratios: dict[int, torch.Tensor] = {}

    def attention(module, query, key, value, attention_mask, fusion=None, **kwargs):
        out, weights = fused_attention(module, query, key, value, attention_mask, fusion=fusion, **kwargs)
        if fusion is not None and module.layer_idx in fusion.indices:
            alone, _ = fused_attention(module, query, key, value, attention_mask, **kwargs)
            crossing, alone = (part.float().flatten(2).norm(dim=-1) for part in (out.float() - alone.float(), alone))
            mask = torch.ones_like(alone) if attention_mask.key_mask is None else attention_mask.key_mask
            ratios[module.layer_idx] = _mean((crossing / alone)[..., None], mask).cpu()
        return out, weights

    AttentionInterface.register(NAME, attention)
    try:
        yield ratios
    finally:
        AttentionInterface.register(NAME, fused_attention)


@contextmanager
def _calls(module: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor | None, Any]]]:
    """[(attention mask, hidden states)] of the module's calls meanwhile."""
    calls: list[tuple[torch.Tensor | None, Any]] = []
    hook = module.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs["attention_mask"], out.hidden_states)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def _mean(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, N, D) and a mask (B, N), None where all tokens are real, -> (B, D), over real tokens."""
    if mask is None:
        return state.float().sum(1) / state.shape[1]
    real = mask.bool()[..., None]
    return state.float().masked_fill(~real, 0).sum(1) / real.sum(1)
