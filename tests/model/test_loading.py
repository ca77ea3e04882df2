"""Loading a saved model and telling it from others; what reads files knows nothing of the model."""

import subprocess
import sys

import pytest
import torch

from layalign.loading import fingerprint, load_model


def test_dtype_and_fingerprint(model_folder):
    model, _ = load_model(model_folder, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(fingerprint(model_folder)) == 64
    assert fingerprint("someone/model") == "someone/model"


@pytest.mark.parametrize("module", ["saving", "published", "loading", "journal"])
def test_files_are_read_below_the_model(module):
    code = f"import sys, layalign.{module}; assert 'layalign.model' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
