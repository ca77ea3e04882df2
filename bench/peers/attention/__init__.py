"""Peers of the fused attention.

Suites: "attention" (forward, and forward with all gradients) and "decode" (one query). make(AttentionCase) returns a
function of q (B, Hq, S, D), k and v (B, Hkv, N, D), cross_k and cross_v (B, Hkv, T, D) and gate (1,), causal where S > 1,
that returns (B, Hq, S, D). A call that it refuses by an exception makes its row a missing one.
"""
