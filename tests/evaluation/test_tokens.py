"""The map of two texts' tokens, their names, and letters that a machine has no font for."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as of_tokenizers
from transformers import PreTrainedTokenizerFast

from layalign import figures, fonts
from layalign.analysis import measures, plots, tokens
from layalign.analysis.tokens import TokenPair, readable, token_map

PAIR = ["ni ngapi 3 na 4", "what is 3"]


def layers_of(model, processor, text):
    """What the first layer's module gives, and the norm behind the last."""
    outs = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: outs.append(out[0] if isinstance(out, tuple) else out))
        for module in (model.encoder.block[0], model.encoder.final_layer_norm)
    ]
    with torch.no_grad():
        model.encoder(processor.encoder_tokenizer(text, return_tensors="pt")["input_ids"])
    for hook in hooks:
        hook.remove()
    return outs


def test_the_map_is_the_cosine_of_each_pair_of_states(loaded):
    """From what each layer's module hands on, the last behind the encoder's norm; the end of sequence is left out."""
    model, processor = loaded
    found = token_map(model, processor, PAIR, [None, None])
    assert found["tokens"] == [text.split() for text in PAIR]
    assert found["layers"] == [1, 2] and found["counts"] == [5, 3]
    states = [[out[0].double() for out in layers_of(model, processor, text)] for text in PAIR]
    for layer in range(2):
        for row in range(5):
            for column in range(3):
                one, other = states[0][layer][row], states[1][layer][column]
                cosine = (one @ other / (one.norm() * other.norm())).item()
                assert found["cosine"][layer][row][column] == pytest.approx(cosine, abs=1e-5)


def test_long_texts_are_cut_and_layers_chosen(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(tokens, "MOST_TOKENS", 2)
    found = token_map(model, processor, PAIR, [None, None], [2, 0, 2])
    assert found["tokens"] == [["ni", "ngapi"], ["what", "is"]] and found["counts"] == [5, 3]
    assert found["layers"] == [2, 0] and torch.tensor(found["cosine"]).shape == (2, 2, 2)
    with pytest.raises(ValueError, match="got 3; the encoder of the model has 0, the embeddings, to 2"):
        token_map(model, processor, PAIR, [None, None], [3])


def test_the_pair_is_chosen():
    parallel = {"en": ["a b c d", "a b", "a"], "sw": ["x", "x y z", "x y z w"], "zh": ["五", "五只", "五只五只五只"]}
    assert TokenPair().among(parallel) == (["五只", "a b"], ["zh", "en"])
    del parallel["zh"]
    assert TokenPair().among(parallel) == (["x y z", "a b"], ["sw", "en"])
    assert TokenPair(languages=("en", "sw")).among(parallel)[1] == ["en", "sw"]
    assert TokenPair(texts=PAIR).among(parallel) == (PAIR, [None, None])
    assert TokenPair(texts=PAIR, languages=("sw", "en")).among(parallel) == (PAIR, ["sw", "en"])
    with pytest.raises(ValueError, match="pair layers: got \\[-1\\]; takes numbers from 0"):
        TokenPair(layers=[-1])


def test_tokens_are_named_as_they_stand_in_texts():
    pieces = Tokenizer(models.WordLevel({"▁five": 0, "▁": 1, "新": 2, "<0xE5>": 3}, unk_token="▁"))
    pieces.decoder = of_tokenizers.Sequence([of_tokenizers.Metaspace(), of_tokenizers.ByteFallback()])
    assert readable(PreTrainedTokenizerFast(tokenizer_object=pieces), [0, 1, 2, 3]) == ["five", "▁", "新", "<0xE5>"]
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    of_bytes = Tokenizer(models.BPE(vocab=letters, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = of_tokenizers.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes)
    assert readable(tokenizer, tokenizer(" aé")["input_ids"]) == ["Ġ", "a", "Ã", "©"]


@pytest.fixture
def known_fonts(monkeypatch):
    """fonts -> the machine has these, {family: file}, beside matplotlib's own."""

    def having(found):
        monkeypatch.setattr(fonts, "_files", lambda: found)
        fonts._fallbacks.cache_clear()

    yield having
    fonts._fallbacks.cache_clear()


def test_the_map_of_a_machine_without_letters_numbers_them(known_fonts, monkeypatch, tmp_path):
    """No box stands for a letter: the token's number does, and the figure says so."""
    found = {
        "tokens": [["五", "3"], ["$5$", "x"]],
        "layers": [1],
        "cosine": [[[0.1, 0.2], [0.3, 1.0]]],
        "counts": [2, 2],
    }
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    known_fonts({})
    plots.plot_tokens({"encoder": found}, [None, "地"], tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["#1", "3"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"\$5\$", "x"]
    assert axes.get_xlabel() == "U+5730" and axes.get_ylabel() == "first text"
    assert "no font of this machine has" in drawn[0].get_supxlabel().replace("\n", " ")


@pytest.mark.filterwarnings("error:Glyph")
def test_letters_come_from_another_font_of_the_machine(known_fonts, tmp_path):
    """Here matplotlib's second own font stands for those that a machine may have."""
    from matplotlib import font_manager

    own, other = (font_manager.findfont(name) for name in ("DejaVu Sans", "STIXGeneral"))
    letter = next(
        letter
        for letter in sorted(fonts._letters(other) - fonts._letters(own))
        if letter.isprintable() and letter > "\x7f"
    )
    known_fonts({"STIXGeneral": other})
    figure, axes = figures.new_figure(2, 2)
    axes.plot([1, 2], label=fonts.legible(f"_{letter}$a$"))
    axes.legend()
    figures.save_figure(figure, [tmp_path / "new" / "x.png", tmp_path / "x.svg"])
    (text,) = axes.get_legend().get_texts()
    assert letter in text.get_text() and "STIXGeneral" in text.get_fontfamily()
    once = (tmp_path / "x.svg").read_bytes()
    figures.save_figure(figure, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_bytes() == once and (tmp_path / "new" / "x.png").stat().st_size


def test_components_of_states_that_lie_in_a_plane():
    """Two axes that were chosen: the points are the coordinates, the shares their squares."""
    generator = torch.Generator().manual_seed(0)
    plane, _ = torch.linalg.qr(torch.randn(7, 2, generator=generator, dtype=torch.float64))
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    places = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]], dtype=torch.float64)
    rows = (5 + places @ plane.T).float()
    found = measures.components({"en": rows[:2], "sw": rows[2:]})
    assert found["share"] == pytest.approx([0.9, 0.1])
    torch.testing.assert_close(torch.tensor(found["points"]["en"]), places[:2].float())
    torch.testing.assert_close(torch.tensor(found["points"]["sw"]), places[2:].float())
