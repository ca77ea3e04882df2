"""Writes the table of families, as the tests find it:

python -m tests.model.family_table > layalign/families.json
"""

import json
import tempfile
import warnings

import transformers

from tests.model import encoder_cells, llm_cells
from tests.model.encoder_cells import ENCODERS, encoder_row
from tests.model.llm_cells import build, llm_row, refused_row
from tests.model.llm_families import JOINED, REFUSED


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if missing := set(llm_cells.PACKAGES.values()) - llm_cells.INSTALLED:
        raise SystemExit(f"the table needs {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as folder:
        llms = {name: llm_row(name, folder) for name in JOINED} | {name: refused_row(name) for name in REFUSED}
    encoders = {name: encoder_row(name, build(JOINED["llama"])) for name in ENCODERS}
    cells = {"llms": llm_cells.CELLS, "encoders": encoder_cells.CELLS}
    print(json.dumps({"cells": cells, "llms": llms, "encoders": encoders}, indent=1))


if __name__ == "__main__":
    main()
