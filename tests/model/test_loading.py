"""Loading a saved model and telling it from others."""

import torch

from layalign.loading import fingerprint, load_model


def test_dtype_and_fingerprint(model_folder):
    model, _ = load_model(model_folder, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(fingerprint(model_folder)) == 64
    assert fingerprint("someone/model") == "someone/model"
