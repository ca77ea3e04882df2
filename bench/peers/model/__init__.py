"""Peers of the whole model.

Suite: "model" (training step, prefill and generation). make(Compared), of bench/model_suite.py, returns a BareLLM or a
System of bench/model_systems.py, over the bases, the batch and a copy of the trained part that it is given.
"""
