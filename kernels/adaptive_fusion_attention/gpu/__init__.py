"""`adaptive_fusion_attention` in Triton. Start at operator.py; the kernels are forward.py, query_gradients.py,
key_value_gradients.py and decode.py, written as kernels/NOTATION.md says."""
