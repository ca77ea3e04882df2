"""Sizes, random bases and random batches of the model benchmarks."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForTextEncoding, LlamaConfig, MT5Config, PreTrainedModel

from bench.cases import Case


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A Llama behind the encoder half of an mT5, and a batch for both.

    inner: width within an MLP. tokens: of each row of the batch. new_tokens: to generate.
    rounds: that many are enough where one takes seconds; None: as many as was asked for.
    ragged: rows of different lengths, so that all masks are in use. full: measured with --full only.
    skewed: rows of lognormal lengths, as sentences have them; the longest has as many tokens as the case says.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    encoder_width: int
    encoder_inner: int
    encoder_layers: int
    encoder_heads: int
    batch: int
    encoder_tokens: int
    prompt_tokens: int
    target_tokens: int
    new_tokens: int
    rounds: int | None = None
    ragged: bool = False
    skewed: bool = False
    full: bool = False

    def __str__(self) -> str:
        names = f"L{self.layers} Dl{self.width} heads {self.heads}/{self.kv_heads} E{self.encoder_layers}"
        tokens = f"B{self.batch} tokens {self.encoder_tokens}+{self.prompt_tokens}+{self.target_tokens}"
        ragged = " ragged" if self.ragged else " skewed" if self.skewed else ""
        return f"{super().__str__()} {names} De{self.encoder_width} {tokens}{ragged}"

    def small(self) -> ModelCase:
        """For --small."""
        group = self.heads // self.kv_heads
        return dataclasses.replace(
            self,
            vocabulary=512,
            width=32 * group,
            inner=96,
            layers=2,
            heads=2 * group,
            kv_heads=2,
            encoder_width=32,
            encoder_inner=48,
            encoder_layers=2,
            encoder_heads=2,
            batch=2,
            encoder_tokens=self.encoder_tokens // 8,
            prompt_tokens=self.prompt_tokens // 8,
            target_tokens=self.target_tokens // 8,
            new_tokens=5,
        )

    def sizes(self, training: bool) -> dict[str, int]:
        """S: positions of the LLM, before the first new token; T: encoder tokens of a row; L: LLM layers."""
        # A bos and a boundary embedding stand beside soft prompts and text.
        positions = 2 + self.encoder_tokens + self.prompt_tokens + (self.target_tokens if training else 0)
        return {"B": self.batch, "S": positions, "T": self.encoder_tokens, "L": self.layers}

    def bases(self) -> list[PreTrainedModel]:
        """Encoder and LLM with random frozen weights, made where and as they stay."""
        torch.manual_seed(0)
        # Both embeddings are only looked up, so the encoder's need not be mT5's table of 250,112.
        encoder = MT5Config(
            vocab_size=self.vocabulary,
            d_model=self.encoder_width,
            d_kv=64,
            d_ff=self.encoder_inner,
            num_layers=self.encoder_layers,
            num_heads=self.encoder_heads,
        )
        llm = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.device(self.device):
            bases = (
                AutoModelForTextEncoding.from_config(encoder, dtype=self.dtype),
                AutoModelForCausalLM.from_config(llm, dtype=self.dtype),
            )
        return [base.eval().requires_grad_(False) for base in bases]

    def prompt(self) -> dict[str, Tensor]:
        """A processor's tensors of questions: encoder_input_ids (B, T), input_ids (B, M) and their masks."""
        generator = torch.Generator().manual_seed(1)
        batch = {}
        for kind, length in (("encoder_", self.encoder_tokens), ("", self.prompt_tokens)):
            batch[f"{kind}input_ids"] = self._ids(length, generator)
            batch[f"{kind}attention_mask"] = mask = torch.ones(self.batch, length, dtype=torch.long)
            if self.ragged:
                for row in range(self.batch):
                    mask[row, length - row * length // (2 * self.batch) :] = 0
            if self.skewed:
                mask *= self._shares(length)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def training(self) -> dict[str, Tensor]:
        """The same questions with targets behind them, and labels."""
        batch = self.prompt()
        target = self._ids(self.target_tokens, torch.Generator().manual_seed(2)).to(self.device)
        labels = torch.cat([torch.full_like(batch["input_ids"], -100), target], dim=1)
        batch["input_ids"] = torch.cat([batch["input_ids"], target], dim=1)
        real = self._shares(self.target_tokens).to(self.device) if self.skewed else torch.ones_like(target)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], real], dim=1)
        if self.skewed:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return batch | {"labels": labels}

    def real_tokens(self) -> int:
        """Positions of the LLM that are no padding, in training."""
        batch = self.training()
        return int(batch["encoder_attention_mask"].sum() + batch["attention_mask"].sum()) + 2 * self.batch

    def _shares(self, most):
        """Mask (B, most) of rows of lognormal lengths (sigma 0.8), the longest `most`; the same shares for questions and texts."""
        drawn = torch.empty(self.batch).log_normal_(0.0, 0.8, generator=torch.Generator().manual_seed(4))
        lengths = (most * drawn / drawn.max()).long().clamp(min=1)
        return (torch.arange(most) < lengths[:, None]).long()

    def _ids(self, length, generator):
        return torch.randint(3, self.vocabulary, (self.batch, length), generator=generator)


def packed_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a training batch end to end, without their padding, as the model takes packed ones."""
    packed = {}
    for kind in ("encoder_", ""):
        mask = batch[f"{kind}attention_mask"].bool()
        packed[f"{kind}input_ids"] = batch[f"{kind}input_ids"][mask][None]
        packed[f"{kind}cu_seqlens"] = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)
    return packed | {"labels": batch["labels"][batch["attention_mask"].bool()][None]}


def twin(module: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules and settings of its own over the same weights."""
    return _over(module, lambda weight: weight)


def in_fp64(llm: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in fp64. Its layers share the weights of `llm` and hold fp64 copies of them while they run only: those of
    a 7B LLM together take 54 GB. So for gradients each layer runs once more in the backward pass, which casts them again."""
    shared = {id(weight) for layer in llm.model.layers for weight in layer.parameters()}
    copied = _over(
        llm,
        lambda weight: weight if id(weight) in shared else nn.Parameter(weight.detach().double(), weight.requires_grad),
    )
    for layer in copied.model.layers:
        layer.forward = _casting(layer, layer.forward)
    return copied


def _over(module, weight_of):
    return copy.deepcopy(module, {id(weight): weight_of(weight) for weight in module.parameters()})


def _casting(layer, forward):
    """`forward` of a layer with frozen weights, which are fp64 within, checkpointed where gradients are wanted.

    Not by transformers' own checkpointing: that asks for train mode, drops the cache in it, and in some versions runs what lies
    within `forward` again without the cast.
    """

    def cast_forward(*arguments, **options):
        own = [
            (module, name, x) for module in layer.modules() for name, x in module._parameters.items() if x is not None
        ]
        for module, name, weight in own:
            module._parameters[name] = weight.detach().double()
        try:
            return forward(*arguments, **options)
        finally:
            for module, name, weight in own:
                module._parameters[name] = weight

    def checkpointed(*arguments, **options):
        if torch.is_grad_enabled():
            return checkpoint(cast_forward, *arguments, use_reentrant=False, **options)
        return cast_forward(*arguments, **options)

    return checkpointed


_CPU = {"device": "cpu", "dtype": torch.float32, "vocabulary": 8192, "width": 576, "inner": 1536, "heads": 9}
_CPU |= {"encoder_width": 512, "encoder_inner": 1024, "encoder_layers": 8, "encoder_heads": 6, "batch": 4}
_CPU |= {"layers": 12, "kv_heads": 3, "new_tokens": 64}
_CPU |= {"encoder_tokens": 64, "prompt_tokens": 64, "target_tokens": 64}
_GPU = {"device": "cuda", "dtype": torch.bfloat16, "encoder_tokens": 256, "encoder_layers": 24}
_LARGE = {"encoder_width": 1024, "encoder_inner": 2816, "encoder_heads": 16}  # mT5-large
_XL = {"encoder_width": 2048, "encoder_inner": 5120, "encoder_heads": 32}  # mT5-xl
_LLAMA_1B = {"vocabulary": 128256, "width": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv_heads": 8}
_LLAMA_2_7B = {"vocabulary": 32000, "width": 4096, "inner": 11008, "layers": 32, "heads": 32, "kv_heads": 32}
_LLAMA_3_8B = {"vocabulary": 128256, "width": 4096, "inner": 14336, "layers": 32, "heads": 32, "kv_heads": 8}
_QUICK = {"prompt_tokens": 256, "target_tokens": 256, "new_tokens": 64, "batch": 8}
_LONG = {"prompt_tokens": 512, "target_tokens": 512, "new_tokens": 128, "rounds": 3, "full": True}

_7B = {**_GPU, **_XL, **_LLAMA_2_7B, **_LONG}
_8B = {**_GPU, **_XL, **_LLAMA_3_8B, **_LONG}


def _memory_case(text: int, **settings) -> ModelCase:
    """At the proportions of real questions and answers, where the published way's memory goes: one row, one round."""
    tokens = {"encoder_tokens": 256, "prompt_tokens": text // 2, "target_tokens": text // 2}
    return ModelCase(**_CPU | tokens | {"batch": 1}, rounds=3, **settings)


_EVERYWHERE = {
    "cpu": ModelCase(**_CPU),
    "cpu_ragged": ModelCase(**_CPU, ragged=True, full=True),
    "gpu_1b": ModelCase(**_GPU, **_LARGE, **_LLAMA_1B, **_QUICK),
    "gpu_1b_ragged": ModelCase(**_GPU, **_LARGE, **_LLAMA_1B, **_QUICK, ragged=True, full=True),
}
# 69 % of all positions of padded rows are padding.
_SKEWED = ModelCase(**_CPU | {"batch": 8, "prompt_tokens": 32}, skewed=True, rounds=3)
_LARGEST = {"gpu_llama_2_7b": ModelCase(**_7B, batch=4), "gpu_llama_3_8b": ModelCase(**_8B, batch=4)}
CASES = {
    "training_step": _EVERYWHERE
    | {"cpu_memory": _memory_case(256), "cpu_skewed": _SKEWED}
    | {f"cpu_memory_{text}": _memory_case(text, full=True) for text in (512, 1024)}
    | _LARGEST,
    "prefill": _EVERYWHERE | _LARGEST,
    "generation": _EVERYWHERE
    | {f"gpu_llama_2_7b_{batch}": ModelCase(**_7B, batch=batch) for batch in (1, 8, 32)}
    | {"gpu_llama_3_8b": ModelCase(**_8B, batch=8)},
}
