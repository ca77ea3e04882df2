"""What is found of an LLM family: every cell of the table is tried on a tiny random model."""

from importlib.util import find_spec

import torch
import transformers

from layalign import LayAlignForConditionalGeneration, families, fusion
from layalign.lora import add_lora, checked_lora
from tests.model.llm_families import JOINED, REFUSED
from tests.model.slow_model import bare_logits, slow_logits

YES, NONE = "yes", "-"
TOLERANCE = 1e-5
CELLS = {
    "closed": "With gates at 0 logits are those of the LLM alone.",
    "open": "With gates open logits are those of a slow formula.",
    "generate": "Greedy answers with a cache are those without, in a batch and alone.",
    "static": "So are those with a static cache.",
    "beam": "Beam search with a cache and in a batch gives what it gives without.",
    "packed": "Sequences packed in one row answer as each does alone.",
    "window": "Sliding windows.",
    "key_norm": "A norm of keys, which cross keys go through too.",
    "bias": "Biases of keys or values.",
    "head_dim": "Heads whose width is not hidden size by heads.",
    "int8": "Weights of 8 bits (bitsandbytes).",
    "lora": "LoRA on the LLM trains, and cross states go through it.",
}
PACKAGES = {"int8": "bitsandbytes", "lora": "peft"}
INSTALLED = {name for name in ("torch", *PACKAGES.values()) if find_spec(name)}
SIZES_OF_ENCODER = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 3}


def build(entry, seed=11):
    """A tiny random model whose weights matter, or None where this transformers has no such class."""
    kind, config, settings = entry
    if not hasattr(transformers, kind) or not hasattr(transformers, config):
        return None
    config = getattr(transformers, config)(**settings)
    config.tie_word_embeddings = False  # a tied head repeats the token that it read
    return enliven(getattr(transformers, kind)(config).eval(), seed)


@torch.no_grad()
def enliven(model, seed):
    """As initialised, norms and biases change nothing and a random LLM repeats one token."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            scale = 0.2 if "emb" in name or "wte" in name or "wpe" in name else 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(noise * scale)
        else:
            weight.add_(noise * 0.2)
    return model


def batch_of(vocabulary=60, questions=50):
    """Three examples whose masks have padding on the left, on the right and in the middle."""
    generator = torch.Generator().manual_seed(14)
    return {
        "encoder_input_ids": torch.randint(3, questions, (3, 6), generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]]),
        "input_ids": torch.randint(3, vocabulary, (3, 7), generator=generator),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1]]),
    }


def row_of(batch, row):
    """A row of a batch without its padding."""
    found = {}
    for prefix in ("encoder_", ""):
        mask = batch[f"{prefix}attention_mask"][row].bool()
        found[f"{prefix}input_ids"] = batch[f"{prefix}input_ids"][row, mask][None]
        found[f"{prefix}attention_mask"] = mask[mask][None].long()
    return found


def encoder():
    return build(("MT5EncoderModel", "MT5Config", SIZES_OF_ENCODER), seed=12)


def joined(base, llm):
    """A model with a random trained part and its gates open."""
    model = LayAlignForConditionalGeneration.from_bases(base, llm)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 0.7 if "fusion_gate" in name else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def near(found, expected):
    """Within the tolerance of a row's largest value."""
    return bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


def require(condition, what):
    if not condition:
        raise AssertionError(what)


class LLMCells:
    """What is found of one family; each method of a cell's name passes, raises, or returns why not."""

    def __init__(self, entry, folder):
        self.entry, self.folder = entry, folder
        self.model = joined(encoder(), build(entry))
        self.batch = batch_of()
        self.windows = []

    def gates(self, value=None):
        """Set all gates, or back to what they were."""
        with torch.no_grad():
            for projection in self.model._projections:
                own = projection.attention.fusion_gate.value
                own.copy_(projection.attention.opened if value is None else torch.full_like(own, value))

    @torch.no_grad()
    def closed(self):
        model, batch = self.model, self.batch
        for projection in model._projections:
            projection.attention.opened = projection.attention.fusion_gate.value.clone()
        self.gates(0.0)
        try:
            out = model(**batch)
            # transformers' SDPA has no soft cap: newer versions refuse it there, older ones leave the cap out.
            capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
            sdpa = model.llm._supports_sdpa and not capped
            for implementation in ("eager", "sdpa") if sdpa else ("eager",):
                expected = bare_logits(model, batch, implementation)
                require(near(out.logits[out.attention_mask], expected[out.attention_mask]), implementation)
            # Without padding the very bits; where there is no SDPA, of LayAlign's own without cross states.
            row = row_of(batch, 2)
            require(torch.equal(model(**row).logits, bare_logits(model, row, "sdpa" if sdpa else fusion.NAME)), "bits")
        finally:
            self.gates()

    @torch.no_grad()
    def open(self):
        out = self.model(**self.batch)
        expected = slow_logits(self.model, self.batch)
        require(near(out.logits[out.attention_mask], expected[out.attention_mask]), "formula")
        alone = bare_logits(self.model, self.batch, fusion.NAME)
        require((out.logits - alone)[out.attention_mask].abs().max() > 0.05, "the cross term does nothing")

    def answer(self, batch, **settings):
        # No token twice: a random LLM soon repeats one for ever, whatever is wrong with it.
        wanted = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted["no_repeat_ngram_size"] = 1
        return self.model.generate(**batch, **wanted | settings)

    def generate(self):
        self.greedy = self.answer(self.batch)
        require(len(self.greedy.unique(dim=0)) == 3, "the same answer to all questions")
        require(torch.equal(self.greedy, self.answer(self.batch, use_cache=False)), "cache")
        for row in range(3):
            require(torch.equal(self.greedy[row : row + 1], self.answer(row_of(self.batch, row))), "alone")

    def static(self):
        require(torch.equal(self.greedy, self.answer(self.batch, cache_implementation="static")), "static cache")

    def beam(self):
        beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5}
        found = self.answer(self.batch, **beams)
        require(torch.equal(found, self.answer(self.batch, **beams, use_cache=False)), "cache")
        require(torch.equal(found[2:4], self.answer(row_of(self.batch, 1), **beams)), "alone")
        require(not torch.equal(found[0], found[1]), "the same answer twice")

    @torch.no_grad()
    def packed(self):
        rows = [row_of(self.batch, row) for row in range(3)]
        packed = {}
        for prefix in ("encoder_", ""):
            ids = [row[f"{prefix}input_ids"] for row in rows]
            packed[f"{prefix}input_ids"] = torch.cat(ids, 1)
            ends = torch.tensor([0, *(one.shape[1] for one in ids)]).cumsum(0)
            packed[f"{prefix}cu_seqlens"] = ends.to(torch.int32)
        out = self.model(**packed)
        for index, row in enumerate(rows):
            begin, end = out.cu_seqlens[index : index + 2].tolist()
            require(near(out.logits[0, begin:end], self.model(**row).logits[0]), "alone")

    def window(self):
        """Windows that the fused attention got while a row longer than these was read."""
        seen, called = set(), fusion.adaptive_fusion_attention

        def watch(*args, window=None, **kwargs):
            seen.add(window)
            return called(*args, window=window, **kwargs)

        fusion.adaptive_fusion_attention = watch
        try:
            with torch.no_grad():
                length = self.model(**self.batch).logits.shape[1]
        finally:
            fusion.adaptive_fusion_attention = called
        return YES if any(window is not None and window < length for window in seen) else NONE

    def key_norm(self):
        return YES if self.model._projections[0].key_norm is not None else NONE

    def bias(self):
        modules = self.model._projections[0].modules
        return YES if any(module.bias is not None and module.bias.abs().max() > 0 for module in modules) else NONE

    def head_dim(self):
        text = self.model.config.get_text_config()
        own = self.model._projections[0].head_dim
        return YES if own * text.num_attention_heads != text.hidden_size else NONE

    def int8(self):
        """On another copy of the LLM, which is as it was before LoRA."""
        llm = build(self.entry)
        llm.save_pretrained(self.folder)
        quantized = {"llm": {"bits": "8bit", "library": "bitsandbytes"}}
        model = LayAlignForConditionalGeneration.from_bases(encoder(), self.folder, quantization=quantized)
        model.load_state_dict(self.model.trained_state_dict(), strict=False)
        families.check(model.llm)
        with torch.no_grad():
            exact, out = self.model(**self.batch).logits, model.eval()(**self.batch)
        require(not any(projection.is_plain for projection in model._projections), "nothing is quantised")
        like = torch.nn.functional.cosine_similarity(exact, out.logits, -1)[out.attention_mask]
        require(like.mean() > 0.95, f"far from what it rounds: {like.mean()}")
        model.generate(**self.batch, max_new_tokens=2, do_sample=False)

    def lora(self):
        """Last: the LLM keeps it."""
        add_lora(self.model.llm, checked_lora({"rank": 2}))
        adapters = {name: own for name, own in self.model.llm.named_parameters() if ".lora_" in name}
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for own in adapters.values():
                own.copy_(torch.randn(own.shape, generator=generator) * 0.3)
        require(adapters, "none")
        self.open()
        for own in adapters.values():
            own.requires_grad_(True)
        labels = self.batch["input_ids"].masked_fill(self.batch["attention_mask"] == 0, -100)
        self.model.train()(**self.batch, labels=labels).loss.backward()
        still = [name for name, own in adapters.items() if own.grad is None or own.grad.abs().max() == 0]
        require(not still, f"no gradient: {still}")


def llm_row(name, folder):
    """{"attention": class names, cell: "yes" or why not}; None where this transformers lacks the family."""
    entry = JOINED[name]
    if not hasattr(transformers, entry[0]):
        return None
    cells = LLMCells(entry, folder)
    found = {"attention": sorted({type(one.attention).__name__ for one in cells.model._projections})}
    return found | {cell: tried(getattr(cells, cell)) for cell in CELLS if PACKAGES.get(cell, "torch") in INSTALLED}


def tried(cell):
    """Its answer; a refusal of packing is one, other errors are not."""
    try:
        return cell() or YES
    except ValueError as error:
        if not str(error).startswith("packed inputs: "):
            raise
        return "no: " + str(error).removeprefix("packed inputs: ").split(";")[0]


def refused_row(name):
    """{"refused": why}; None where this transformers lacks the family."""
    llm = build((REFUSED | JOINED)[name])
    if llm is None:
        return None
    try:
        joined(encoder(), llm)(**batch_of())
    except (ValueError, RuntimeError) as error:
        return {"attention": [], "refused": str(error)}
    raise AssertionError(f"{name} is not refused")
