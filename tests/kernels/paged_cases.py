"""Calls of adaptive_fusion_decode_paged: random caches of shared and permuted pages, NaN in every slot that no row uses."""

import dataclasses
import random

import torch

NAMES = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cross_k_cache", "cross_v_cache", "cross_block_table")
NAMES = (*NAMES, "cross_seq_lens", "gate")
# How the two caches lie in one tensor: apart, one after the other, by page, and in each row, as vLLM's 0.32 has them.
LAYOUTS = ("apart", "two_pages", "two_caches", "rows")
GARBAGE = (-1, 2**31 - 1, -(2**31))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCase:
    """One call; lengths of rows, pages' sizes, its options."""

    seed: int = 0
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    width: int = 16
    page: int = 16
    cross_page: int = 16
    lengths: tuple = (1, 16, 40)
    cross_lengths: tuple = (20, 0, 16)
    layout: str = "rows"
    dtype: torch.dtype = torch.float32
    gate_shape: tuple = (1,)
    sink: bool = False
    options: dict = dataclasses.field(default_factory=dict)

    def inputs(self):
        """By NAMES."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.lengths), self.queries, self.heads, self.width)
        q = torch.randn(shape, generator=generator).to(self.dtype).transpose(1, 2)
        window = self.options.get("window")
        own = self._keys(generator, self.lengths, self.page, None if window is None else window + self.queries - 1)
        cross = self._keys(generator, self.cross_lengths, self.cross_page, None)
        return [q, *own, *cross, torch.randn(self.gate_shape, generator=generator)]

    def keywords(self):
        sink = torch.linspace(-1, 2, self.heads)
        return self.options | ({"sink": sink} if self.sink else {})

    def _keys(self, generator, lengths, page, seen):
        """k_cache, v_cache, table, lengths; seen: how many of the last keys of a row are read, None for all."""
        choose = random.Random(f"pages {self.seed} {page}")
        width = max(1, *(-(-length // page) for length in lengths)) + choose.randint(0, 2)
        pages = max(width, 2) * 2
        cache = torch.randn(2, pages, page, self.kv_heads, self.width, generator=generator).to(self.dtype)
        table = torch.tensor([[choose.choice(GARBAGE) for _ in range(width)] for _ in lengths], dtype=torch.int32)
        used = torch.zeros(pages, page, dtype=torch.bool)
        for row, length in enumerate(lengths):
            # Rows share pages with each other, and one row's are no neighbours.
            numbers = choose.sample(range(pages), width)
            for key in range(0 if seen is None else max(0, length - seen), length):
                table[row, key // page] = numbers[key // page]
                used[numbers[key // page], key % page] = True
        cache = cache.masked_fill(~used[None, :, :, None, None], torch.nan)
        return *self._laid_out(cache), table.reshape(len(lengths), width), torch.tensor(lengths, dtype=torch.int32)

    def _laid_out(self, cache):
        if self.layout == "two_caches":
            return cache.unbind(0)
        if self.layout == "two_pages":
            return cache.transpose(0, 1).contiguous().unbind(1)
        if self.layout == "rows":
            beside = cache.permute(1, 3, 2, 0, 4).flatten(3).contiguous()  # (pages, Hkv, page, 2 D)
            return beside.transpose(1, 2).split(self.width, dim=-1)
        return [x.clone() for x in cache]


def draw(seed, dtypes):
    """The random call of a seed."""
    choose = random.Random(f"paged {seed}")
    kv_heads, queries, page = choose.choice((1, 2)), choose.choice((1, 1, 1, 2, 5)), choose.choice((8, 16, 24, 32))
    heads, cross_page = kv_heads * choose.choice((1, 4)), choose.choice((16, 32, 40))
    rows = choose.choice((1, 2, 3))
    lengths = [choose.choice((0, queries, page, 2 * page, choose.randint(1, 4 * page))) for _ in range(rows)]
    cross_lengths = [choose.choice((0, 1, cross_page, choose.randint(1, 2 * cross_page))) for _ in range(rows)]
    options = {}
    if choose.random() < 0.4:
        options["window"] = choose.choice((1, 7, 16, 17, 30))
    if choose.random() < 0.3:
        options["softcap"] = choose.choice((0.5, 4.0))
    if choose.random() < 0.3:
        options["scale"] = choose.choice((0.0, -0.3, 0.5))
    return PagedCase(
        seed=seed,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        width=choose.choice((16, 40, 64)),
        page=page,
        cross_page=cross_page,
        lengths=tuple(lengths),
        cross_lengths=tuple(cross_lengths),
        layout=choose.choice(LAYOUTS),
        dtype=choose.choice(dtypes),
        gate_shape=choose.choice(((1,), (heads,), (rows, heads, queries))),
        sink=choose.random() < 0.2,
        options=options,
    )
