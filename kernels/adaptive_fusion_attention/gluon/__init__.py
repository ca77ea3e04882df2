"""The attention in Triton's Gluon, for Hopper alone: schedule.py says what happens when; kernel.py, forward.py launches it, is the forward;
key_value_gradients.py and query_gradients.py, launched by backward.py, are its gradients.

Imported by nobody unless LAYALIGN_GLUON=1 asks for it: no GPU has run it yet.
"""
