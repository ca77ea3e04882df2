import pytest

from layalign.train.demo.real import tatoeba


def test_training_pairs(tmp_path):
    (tmp_path / "tatoeba_pairs").mkdir()
    file = tmp_path / "tatoeba_pairs" / "tha-eng.txt"
    file.write_text("One.\tก\nTwo.\tข\nThree.\tค\nFour.\tง\n", encoding="utf-8")
    assert tatoeba.training_pairs(tmp_path, most=2) == [
        {"source": "ก", "target": "One.", "lang": "th"},
        {"source": "ค", "target": "Three.", "lang": "th"},
    ]
    assert tatoeba.training_pairs(None) == []
    file.rename(tmp_path / "tatoeba_pairs" / "xyz-eng.txt")
    with pytest.raises(ValueError, match=r"xyz-eng\.txt: no language known for 'xyz'"):
        tatoeba.training_pairs(tmp_path)
