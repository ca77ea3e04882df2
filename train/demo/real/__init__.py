"""The real pair: multilingual-e5-small and SmolLM2-135M-Instruct, the experiment with them, and its trained part."""
