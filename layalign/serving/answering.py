"""EngineAnswerer: a job's texts answered by vLLM's engine, which batches them token by token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from layalign.configuration import LayAlignConfig
from layalign.generation.batches import Asked
from layalign.generation.texts import Answerer
from layalign.loading import check_model_path, torch_dtype
from layalign.processor import LayAlignProcessor
from layalign.prompts import fill_prompts
from layalign.serving.registration import tell_vllm
from layalign.serving.settings import check_served, encoder_limit

# What of transformers' arguments of `generate` there is in vLLM with the same meaning, and what an engine without them would do.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# Set by `Answerer` itself.
_OWN = {"do_sample", "max_new_tokens", "min_new_tokens", "pad_token_id", "eos_token_id"}
# Texts are handed to the engine so many times those that it works on at once: it is never without new ones to begin.
AHEAD = 8


class EngineAnswerer(Answerer):
    """The same answers by vLLM, see `Answerer`; in fp32 and greedily, token for token.

    Args:
        model_path: folder or hub name of a LayAlign model.
        dtype: as of `layalign.loading.load_model`; None: as stored.
        batch_size: the most texts that the engine works on at once.
        engine: further arguments of `vllm.LLM`: max_model_len, gpu_memory_utilization, tensor_parallel_size, ...
        answering: the other arguments of `Answerer`; of those of transformers' generate temperature, top_p, top_k, do_sample.

    Raises:
        ValueError: no model there, one that vLLM cannot serve, another vLLM than the one that LayAlign serves on, or an argument
            outside of these.
        ModuleNotFoundError: no vLLM.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str | None = None,
        batch_size: int = 64,
        engine: dict[str, Any] | None = None,
        **answering: Any,
    ):
        check_model_path(model_path)
        config = LayAlignConfig.from_pretrained(str(model_path))
        check_served(config)
        # What of a model the texts' checks and the decoding ask for.
        defaults = GenerationConfig.from_pretrained(str(model_path))
        stand_in: Any = SimpleNamespace(encoder_limit=encoder_limit(config), generation_config=defaults)
        processor = LayAlignProcessor.from_pretrained(str(model_path))
        super().__init__(stand_in, processor, batch_size=batch_size, **answering)
        self._sampling = _sampling(self._arguments, defaults)
        wanted = config.get_text_config().dtype if dtype in (None, "auto") else torch_dtype(dtype)
        tell_vllm()
        from vllm import LLM

        given = {"model": str(model_path), "dtype": wanted or "auto", "max_num_seqs": batch_size, **(engine or {})}
        self.engine = LLM(**given)
        self.batch_size = batch_size * AHEAD

    def _generate(self, asked: Asked, **arguments: Any) -> torch.Tensor:
        from vllm import SamplingParams

        if "streamer" in arguments:
            raise ValueError("streamer: the engine answers many texts at once; `layalign serve` streams")
        texts, langs, places = asked
        prompts: list[str | None] = [None] * len(texts)
        if self.prompt is not None:
            prompts = [*fill_prompts(self.prompt, texts, langs)]
        spoken: list[str | None] = [None] * len(texts) if langs is None else [*langs]
        requests = [self._request(*asked) for asked in zip(texts, prompts, spoken, strict=True)]
        seeds: list[int | None] = [None] * len(texts)
        if self._sampling["temperature"]:
            # By the text, so that no batch changes a sample; else as the caller's torch.manual_seed says.
            drawn = torch.randint(2**63 - 1, (len(texts),)).tolist()
            seeds = drawn if self.seeds is None else [self.seeds[place] % 2**63 for place in places]
        sampling = [SamplingParams(**self._sampling, seed=seed) for seed in seeds]
        outs = self.engine.generate(requests, sampling, use_tqdm=False)
        rows = [torch.tensor(out.outputs[0].token_ids, dtype=torch.long) for out in outs]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)

    def _request(self, text: str, prompt: str | None, lang: str | None) -> dict[str, Any]:
        """A text as `layalign.serving.requests` takes it."""
        reading = {"lang": lang, "encoder_max_length": self.encoder_max_length}
        asked = {"prompt": text, "mm_processor_kwargs": {k: value for k, value in reading.items() if value is not None}}
        said: dict[str, Any] = {"prompt_token_ids": []} if prompt is None else {"prompt": prompt}
        return {"encoder_prompt": asked, "decoder_prompt": said}

    def _loglikelihoods(self, asked: Asked, answers: list[str]) -> torch.Tensor:
        raise NotImplementedError("vLLM: answers are generated there, not scored; load the model by `load_model`")


def _sampling(given: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """vLLM's arguments of SamplingParams.

    Args:
        given: transformers' arguments of `generate`.
        defaults: the model's own.

    Raises:
        ValueError: arguments that vLLM has no equal of.
    """
    other = sorted(name for name, value in given.items() if value is not None and name not in _OWN | SAMPLING.keys())
    if set(other) - {"repetition_penalty"}:
        raise ValueError(f"engine: vLLM takes {', '.join(SAMPLING)} of generate's arguments, got {', '.join(other)}")
    penalty = given.get("repetition_penalty") or defaults.repetition_penalty or 1.0
    if penalty != 1.0:
        raise ValueError(
            f"repetition_penalty: got {penalty} (of the call or of generation_config.json), takes 1.0 with vLLM, which would count the "
            "ids that stand there for soft prompts as said before"
        )
    found = {
        "max_tokens": given["max_new_tokens"],
        "min_tokens": given.get("min_new_tokens") or 0,
        "stop_token_ids": given.get("eos_token_id") or [],
        "temperature": 0.0,
    }
    if given.get("do_sample"):
        # As transformers looks values up: the caller's, the model's, the library's.
        candidates = {name: (given.get(name), getattr(defaults, name, None), last) for name, last in SAMPLING.items()}
        found |= {name: next(v for v in values if v is not None) for name, values in candidates.items()}
    return found
