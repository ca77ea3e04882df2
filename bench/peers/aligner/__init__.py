"""Peers of the layer-wise aligner's operators.

Suites: "layer_mix", "stream_linear" and "cross_key_values", each named after the operator. make(AlignerCase) returns a
function of the operator's arguments, which returns the same tensors.
"""
