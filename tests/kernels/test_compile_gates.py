"""The shipped kernels pass the gates of the ahead-of-time compile report. The caches are the user's; they know kernels by their sources."""

import pytest

from layalign.kernels.ahead_of_time.calls import described_calls
from layalign.kernels.ahead_of_time.report import compile_report, describe

# CI compiles each variant, each width and, for each architecture, an attention and an aligner; --thorough everything.
CALLS = [
    ("sm_80", "causal", 64, False),
    ("sm_90", "causal", 128, False),
    ("sm_80", "unfolded", 128, False),
    ("sm_90", "folded", 128, False),
    ("sm_90", "causal", 64, True),
    ("sm_80", "causal", 128, True),
    ("sm_90", "unfolded", 128, True),
    ("sm_80", "folded", 128, True),
    ("sm_90", "paged", 128, True),
    ("sm_80", "paged", 64, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "variant", "head_dim"),
    [pytest.param(*call, marks=pytest.mark.thorough if thorough else ()) for *call, thorough in CALLS],
)
def test_shipped_kernels_pass_the_gates(arch, variant, head_dim):
    calls = described_calls([arch], head_dims=[head_dim], variants=[variant])[-1:]
    lines = [line for lines in compile_report(calls, 1) for line in lines]
    assert len({line["kernel"] for line in lines}) >= (2 if variant == "paged" else 4)
    assert not [f"{describe(line)}: {line['failures']}" for line in lines if line["failures"]]
