"""LayAlign as a model of vLLM: paged caches, continuous batching, an OpenAI-compatible server.

vLLM finds `register` by its entry point `vllm.general_plugins`; then `vllm.LLM(model=FOLDER)` and `vllm serve FOLDER` take what
`save_pretrained` writes. Nothing here imports vLLM before it does.
"""

from layalign.serving.registration import register

__all__ = ["register"]
