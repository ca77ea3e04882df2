"""What the library costs: `pytest bench/` measures, `python -m bench report` and `check` read what it recorded."""
