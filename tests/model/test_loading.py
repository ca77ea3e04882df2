"""Loading a saved model and telling it from others; what reads files knows nothing of the model."""

import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from layalign import LayAlignProcessor, loading
from layalign.loading import fingerprint, load_model, load_tokenizer


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


def test_a_tokenizer_that_is_a_sentencepiece_file_alone(tmp_path, monkeypatch):
    """mT5's, as it is published."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("what is this\nthat is what\nthis is that and more of it\n" * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=23, minloglevel=2
    )
    (tmp_path / "config.json").write_text('{"model_type": "mt5"}')
    tokenizer = load_tokenizer("encoder", tmp_path, {})
    assert tokenizer.decode(tokenizer("what is this")["input_ids"], skip_special_tokens=True) == "what is this"

    def unread(*_, **__):
        raise ImportError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", unread)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="loaded: a SentencePiece file alone is read with `pip install sentencepiece protobuf`"
    ):
        load_tokenizer("encoder", tmp_path, {})


def test_a_model_in_a_subfolder(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "sub")
    model, processor = load_model(tmp_path, device="cpu", subfolder="sub")
    assert model(**processor("what is this")).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"the folder .*other holds no model|no such folder: .*other"):
        load_model(tmp_path, device="cpu", subfolder="other")


def test_an_encoders_tokenizer_without_padding(bases, tmp_path):
    """A decoder-only encoder's: the mask hides what is padded."""
    tokenizer = AutoTokenizer.from_pretrained(str(bases / "llm"))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    processor = LayAlignProcessor.from_bases(tmp_path, bases / "llm")
    mask = processor(["what", "what is this"])["encoder_attention_mask"]
    assert mask.sum(1).tolist() == sorted(mask.sum(1).tolist()) and not mask.bool().all()
