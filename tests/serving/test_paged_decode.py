"""LAYALIGN_PAGED_DECODE: what stands for vLLM's forward, over caches and metadata of vLLM's shapes; what is left as it was."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.serving import paged_decode
from layalign.serving.paged_decode import PagedDecode, warn_once, why_not
from layalign.serving.settings import paged_decode_asked

HEADS, KV_HEADS, WIDTH, PAGE, BLOCKS = 4, 2, 16, 16, 12


def cache_of(lengths, generator):
    """(pages, Hkv, keys of a page, 2 D) with NaN where no row has a key, block table (B, n) of vLLM's width, lengths (B,)."""
    cache = torch.full((BLOCKS, KV_HEADS, PAGE, 2 * WIDTH), torch.nan)
    table = torch.zeros(len(lengths), 5, dtype=torch.int32)  # vLLM leaves page 0 where a request has none
    free = iter((torch.randperm(BLOCKS - 1, generator=generator) + 1).tolist())
    for row, length in enumerate(lengths):
        for first in range(0, length, PAGE):
            table[row, first // PAGE] = page = next(free)
            count = min(PAGE, length - first)
            cache[page, :, :count] = torch.randn(KV_HEADS, count, 2 * WIDTH, generator=generator)
    return cache, table, torch.tensor(lengths, dtype=torch.int32)


class Implementation:
    """As vLLM's of one attention: each request's tokens over its keys, through the block table; sees all keys unless layer.causal."""

    def __init__(self, window=None, softcap=0):
        self.scale, self.window, self.logits_soft_cap = 0.3, window, softcap
        self.alibi_slopes, self.calls = None, 0

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        self.calls += 1
        if attn_metadata is None:
            return output.fill_(0)
        starts = attn_metadata.query_start_loc.tolist()
        for row, (begin, end) in enumerate(pairwise(starts)):
            length = int(attn_metadata.seq_lens[row])
            pages = kv_cache[attn_metadata.block_table[row].long()].transpose(1, 2).flatten(0, 1)[:length]
            k, v = pages.transpose(0, 1)[None].split(WIDTH, dim=-1)
            q = query[begin:end].transpose(0, 1)[None]
            if layer.causal:
                nothing, given = k[:, :, :0], dict(window=self.window, softcap=self.logits_soft_cap or None)
                found = adaptive_fusion_attention(
                    q, k, v, nothing, nothing, torch.zeros(1), scale=self.scale, backend="torch", **given
                )
            else:
                k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
                found = torch.softmax(self.scale * q @ k.transpose(2, 3), -1) @ v  # 0 of no key
            output[begin:end] = found[0].transpose(0, 1)
        return output


def stand_ins(window=None, softcap=0):
    """vLLM's layers as far as PagedDecode looks at them."""
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN", forward_includes_kv_cache_update=False)
    common = dict(num_kv_heads=KV_HEADS, head_size=WIDTH, attn_backend=backend, has_sink=False)
    common |= dict(dtype=torch.float32, kv_cache_torch_dtype=torch.float32, kv_sharing_target_layer_name=None)
    own = SimpleNamespace(impl=Implementation(window, softcap), sliding_window=window, causal=True, **common)
    cross = SimpleNamespace(impl=Implementation(), layer_name="cross", causal=False, **common)
    return own, cross


def step(lengths, cross_lengths, tokens, padding=0):
    """-> cache and metadata of both attentions in a step that reads the last `tokens` of each request."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0)
    sides = []
    for each in (lengths, cross_lengths):
        cache, table, seq_lens = cache_of(each, generator)
        metadata = dict(num_actual_tokens=sum(tokens), max_query_len=max(tokens), max_seq_len=max(each))
        metadata |= dict(seq_lens=seq_lens, block_table=table, query_start_loc=starts)
        sides.append((cache, SimpleNamespace(**metadata)))
    query = torch.randn(sum(tokens) + padding, HEADS, WIDTH, generator=generator)
    return query, *sides


def written(decode, query, own):
    output = torch.full_like(query, 7.0)
    found = decode(decode.own, query, None, None, *own, output=output)
    assert found is output
    return output


@pytest.mark.parametrize("gate", [torch.tensor([0.7]), torch.tensor([0.7, -1.0, 0.0, 2.0])], ids=["scalar", "head"])
@pytest.mark.parametrize(("window", "softcap"), [(None, 0), (9, 0), (None, 2.0)])
@pytest.mark.parametrize("kernel", [False, True])
def test_a_decoding_step(quick_interpreter, monkeypatch, gate, window, softcap, kernel):
    """The same from the kernel's source, or PyTorch, in one call as from both of vLLM's implementations; padding stays as it was."""
    if kernel:
        operator = paged_decode.adaptive_fusion_decode_paged
        monkeypatch.setattr(
            paged_decode, "adaptive_fusion_decode_paged", lambda *x, **given: operator(*x, **given, backend="triton")
        )
    query, own_side, cross_side = step((1, 33, 16, 40), (20, 0, 16, 3), (1, 1, 1, 1), padding=2)
    own, cross = stand_ins(window, softcap)
    decode = PagedDecode(own, cross, lambda: gate, lambda name: (cross_side[1], None, cross_side[0], None))
    in_one = written(decode, query, own_side)
    assert not own.impl.calls and not cross.impl.calls
    own_side[1].max_query_len = 2  # as where another request's prompt is read
    in_two = written(decode, query, own_side)
    assert own.impl.calls == cross.impl.calls == 1
    torch.testing.assert_close(in_one[:4], in_two[:4])
    assert (in_one[4:] == 7).all()


def test_steps_that_read_prompts():
    """Go through both implementations: a prompt of 9 tokens beside a request that decodes."""
    query, own_side, cross_side = step((9, 20), (5, 16), (9, 1))
    own, cross = stand_ins()
    gate = torch.tensor([0.7])
    decode = PagedDecode(own, cross, lambda: gate, lambda name: (cross_side[1], None, cross_side[0], None))
    output = written(decode, query, own_side)
    parts = []
    for layer, (cache, metadata) in ((own, own_side), (cross, cross_side)):
        parts.append(torch.empty_like(query))
        layer.impl.forward(layer, query, None, None, cache, metadata, output=parts[-1])
    assert torch.equal(output, parts[0] + 0.7 * parts[1])
    assert not written(decode, query, (own_side[0], None)).any()  # vLLM measures memory


def test_another_layout_goes_through_both(caplog):
    query, own_side, cross_side = step((3, 20), (5, 16), (1, 1))
    cross_cache = torch.stack(cross_side[0].transpose(1, 2).split(WIDTH, -1))  # (2, pages, keys of a page, Hkv, D)
    own, cross = stand_ins()
    cross.impl.forward = lambda *args, output: output.fill_(1)
    decode = PagedDecode(own, cross, lambda: torch.ones(1), lambda name: (cross_side[1], None, cross_cache, None))
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.layalign"):
        for _ in range(2):
            written(decode, query, own_side)
    assert own.impl.calls == 2
    assert [x.getMessage() for x in caplog.records] == [
        "LAYALIGN_PAGED_DECODE=1 is left out, two attention calls serve: a cache has the shape (2, 12, 16, 2, 16)"
    ]


CHANGES = {
    "vLLM runs on cpu here": ({}, "cpu"),
    "backend is FLASHINFER": ({"attn_backend": SimpleNamespace(get_name=lambda: "FLASHINFER")}, "cuda"),
    "the caches are torch.float8_e4m3fn": ({"kv_cache_torch_dtype": torch.float8_e4m3fn}, "cuda"),
    "no kernel has torch.float32 heads of 128": ({"head_size": 128}, "cuda"),
    "sinks, ALiBi or": ({"has_sink": True}, "cuda"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_where_it_cannot_serve(reason):
    changes, platform = CHANGES[reason]
    own, cross = stand_ins()
    assert why_not(own, cross, "cuda") is None
    vars(own).update(changes)
    assert reason in why_not(own, cross, platform)


@pytest.mark.parametrize(("given", "asked"), [(None, False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch, given, asked):
    monkeypatch.delenv("LAYALIGN_PAGED_DECODE", raising=False)
    if given is not None:
        monkeypatch.setenv("LAYALIGN_PAGED_DECODE", given)
    assert paged_decode_asked() is asked


def test_a_switch_that_is_neither(monkeypatch):
    monkeypatch.setenv("LAYALIGN_PAGED_DECODE", "yes")
    with pytest.raises(ValueError, match=r"^LAYALIGN_PAGED_DECODE: got 'yes', takes 0 or 1$"):
        paged_decode_asked()


ENGINE = """
import os, sys
from tests.serving.conftest import engine, greedy
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
llm = engine(sys.argv[1])
answers = [out.outputs[0].text for out in llm.generate(["2 + 5?", "8 na 8?"], greedy())]
print("ANSWERS", repr(answers), "layalign.serving.paged_decode" in sys.modules)
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm)")
def test_on_a_cpu_two_calls_serve(model_folder):
    """Without the switch nothing is imported; with it a server says once what serves instead, and answers the same."""
    found = {}
    for given in ("0", "1"):
        environment = os.environ | {"LAYALIGN_PAGED_DECODE": given}
        run = subprocess.run(
            [sys.executable, "-c", ENGINE, model_folder], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found[given] = next(x for x in run.stdout.splitlines() if x.startswith("ANSWERS")), run.stdout + run.stderr
    said = "LAYALIGN_PAGED_DECODE=1 is left out, two attention calls serve: vLLM runs on cpu here, and it is for cuda"
    assert found["0"][0].endswith("False") and said not in found["0"][1]
    assert found["1"][0] == found["0"][0].removesuffix("False") + "True" and found["1"][1].count(said) == 1
