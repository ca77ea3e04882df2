"""The layer-wise aligner in Triton: mix.py and matmul.py hold kernels and launchers, written as kernels/NOTATION.md says; operator.py
is `layer_mix` and `stream_linear`. `cross_key_values` calls both kernels' launchers from ../key_values.py and ../projections.py."""
