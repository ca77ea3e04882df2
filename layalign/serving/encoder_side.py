"""EncoderSide: encoder, adapter and layer-wise aligner of a served model, LayAlign's own modules, once a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from layalign.base_models import written_down
from layalign.configuration import LayAlignConfig
from layalign.families import KeyValueLayout
from layalign.loading import load_encoder
from layalign.modules import Adapter, LayerwiseAligner
from layalign.projections import KeyValueProjection, split_heads
from layalign.serving.settings import KEY_NORMS


class EncoderSide(nn.Module):
    """What makes of a question all that the LLM gets.

    Args:
        config: the model's settings.
        path: the model's folder or hub name.
        dtype: of all weights and results.
        at_once: the most tokens, padding among them, that the encoder reads at a time, a longer question apart. vLLM counts those of
            questions alone when it measures memory and fills a step.
    """

    def __init__(self, config: LayAlignConfig, path: str, dtype: torch.dtype, at_once: int):
        super().__init__()
        self.config, self.at_once = config, at_once
        name, place = written_down("encoder", config, path)
        device = torch.get_default_device()
        self.encoder = load_encoder(name, dtype, **place).to(device).eval()
        width, text = self.encoder.config.hidden_size, config.get_text_config()
        self.adapter = Adapter(config.adapter or "mlp", width, text.hidden_size, config.adapter_width)
        self.aligner = None
        layers = config.fused_layers
        if config.aligner and layers:
            average = config.encoder_states == "mean"
            states = len(config.mixed_states)
            sizes = (states, len(layers), width, text.hidden_size)
            self.aligner = LayerwiseAligner(config.aligner, *sizes, average, config.aligner_width)
        self.eval().requires_grad_(False)
        self.dtype = dtype
        self._projections: list[KeyValueProjection] = []

    def load_trained(self, weights: dict[str, torch.Tensor]) -> None:
        """Adapter and aligner.

        Raises:
            ValueError: weights that are missing, too many, or of another shape.
        """
        own = {name: value for name, value in self.named_parameters() if not name.startswith("encoder.")}
        wrong = sorted(own.keys() ^ weights.keys())
        wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
        if wrong:
            raise ValueError(f"the trained part does not fit this model: {', '.join(wrong)}")
        for name, value in own.items():
            value.data.copy_(weights[name])

    def take_projections(self, modules: Sequence[nn.Module]) -> None:
        """The key and value projections of the fused layers.

        Args:
            modules: their attention modules in vLLM, loaded, before vLLM brings their weights into another order.
        """
        norm = KEY_NORMS[self.config.get_text_config().model_type]
        self._projections = [_projection(module, norm) for module in modules]

    @torch.no_grad()
    def forward(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encoder ids (T,) of each question -> (T, Dl + 2 L kv) of each: soft prompts, and of each layer keys and values."""
        outputs: list[Any] = [None] * len(rows)
        for places in of_similar_lengths([len(row) for row in rows], self.at_once):
            for place, output in zip(places, self._read([rows[place] for place in places]), strict=True):
                outputs[place] = output
        return outputs

    def _read(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same of questions that are padded to the longest."""
        ids = pad_sequence(list(rows), batch_first=True)
        lengths = [len(row) for row in rows]
        mask = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
        out = self.encoder(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        # Of the real tokens alone, one question after the other.
        parts = [self.adapter(out.last_hidden_state[mask]).to(self.dtype)]
        if self.aligner is not None:
            states = [out.hidden_states[index][mask][None] for index in self.config.mixed_states]
            made = self.aligner(states, self._projections, self.dtype, fold=self.config.fold_at_inference)
            keys, values = split_heads(self._projections, *made)  # (L, 1, tokens, Hkv, D)
            both = torch.stack([keys[:, 0], values[:, 0]], 1)
            parts.append(both.permute(2, 0, 1, 3, 4).flatten(1))
        return list(torch.cat(parts, 1).split(lengths))

    def by_layer(self, states: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (tokens, Hkv, D) of each fused layer, of what `forward` gave behind the soft prompts."""
        if self.aligner is None:
            return
        first = self._projections[0]
        parts = states.unflatten(1, (len(self._projections), 2, first.heads, first.head_dim))
        for layer in range(len(self._projections)):
            yield parts[:, layer, 0].contiguous(), parts[:, layer, 1].contiguous()


def of_similar_lengths(lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Places of questions, from the shortest to the longest, in groups that are read together.

    Args:
        lengths: of the questions.
        at_once: the most tokens of a group that is padded to its longest; a longer question is a group of its own.
    """
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[place] > at_once:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


class _Projections(nn.Module):
    """A vLLM attention module's projections of keys and values, this process's heads of them, as LayAlign's own code takes them."""

    def __init__(self, attention: Any, norm: str | None):
        super().__init__()
        joined, kv = attention.qkv_proj, attention.kv_size
        for name, first in (("k_proj", attention.q_size), ("v_proj", attention.q_size + kv)):
            linear = nn.Linear(joined.weight.shape[1], kv, bias=joined.bias is not None, device="meta")
            # Views: they stay where vLLM puts another in the weight's place.
            linear.weight = nn.Parameter(joined.weight.data[first : first + kv], requires_grad=False)
            if joined.bias is not None:
                linear.bias = nn.Parameter(joined.bias.data[first : first + kv], requires_grad=False)
            setattr(self, name, linear)
        if norm is not None:
            setattr(self, norm, getattr(attention, norm))


def _projection(attention: Any, norm: str | None) -> KeyValueProjection:
    layout = KeyValueLayout(key_norm=norm)
    heads = attention.num_kv_heads
    return KeyValueProjection(_Projections(attention, norm), heads, attention.kv_size // heads, layout)
