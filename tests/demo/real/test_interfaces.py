"""Sentence pairs of programs' interfaces, from wheels made here."""

import dataclasses
import json

import pytest

from layalign.kernels.files import sha256_of
from layalign.train.demo.driver import keep
from layalign.train.demo.real import interfaces
from layalign.train.demo.real.data import prepare
from layalign.train.demo.real.fetch import FetchError, Package
from layalign.train.demo.real.plan import Settings, read_plan

OWN = {
    "en": {"a": "There is nothing here", "b": "Save", "c": "{n} users were found", "d": "Find  something to\nread"},
    "es_ES": {"a": " "},
    "sw_TZ": {"a": "Hakuna kitu hapa", "b": "Hifadhi", "c": "Watumiaji {n} wamepatikana", "e": "Ziada"},
    "te": {"a": "There is nothing here", "d": "చదవడానికి ఏదైనా కనుగొనండి"},
}
GETTEXT = {
    "": {"domain": "x"},
    "menu\x04Open the last file": ["最後のファイルを開く"],
    "Open the last file": ["最後のファイルを開きます"],
    "Not translated at all": [""],
    "Close it": ["閉じる"],
}


@pytest.fixture
def two(index, monkeypatch, miniature):
    """Interfaces of two small wheels that pip finds."""
    found = []
    for interface, members in (
        (
            interfaces.INTERFACES[0],
            {f"kolibri/locale/{name}/LC_MESSAGES/x.json": json.dumps(texts) for name, texts in OWN.items()}
            | {"kolibri/locale/te/LC_MESSAGES/unknown.json": json.dumps({"z": "no English of it"})},
        ),
        (
            interfaces.INTERFACES[1],
            {interfaces.INTERFACES[1].folder.format(name="ja_JP") + "x.json": json.dumps(GETTEXT)},
        ),
    ):
        package = Package(interface.wheel.name, "1.0", None, "")
        sha256 = sha256_of(miniature.write_wheel(index, package, members))
        found.append(dataclasses.replace(interface, wheel=dataclasses.replace(package, sha256=sha256)))
    monkeypatch.setattr(interfaces, "INTERFACES", tuple(found))
    return found


def test_sentences_that_a_language_has(two, tmp_path):
    """Those of three words, without places for values, once a language; what was left in English is none."""
    expected = [
        {"source": "Hakuna kitu hapa", "target": "There is nothing here", "lang": "sw"},
        {"source": "చదవడానికి ఏదైనా కనుగొనండి", "target": "Find something to read", "lang": "te"},
        {"source": "最後のファイルを開く", "target": "Open the last file", "lang": "ja"},
    ]
    assert interfaces.interface_pairs(tmp_path / "cache") == expected
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(
        interface.wheel.wanted for interface in two
    )
    counts = {"translation": 10, "task": 1}
    report = prepare(
        tmp_path / "data", counts, None, 1.0, further=lambda: interfaces.interface_pairs(tmp_path / "cache")
    )
    assert report["records"]["translation"] == {"generated": 7, "real": 3}
    assert report["real_languages"] == {"ja": 1, "sw": 1, "te": 1}


def test_another_wheel_is_refused(two, tmp_path, monkeypatch):
    wheel = dataclasses.replace(two[0].wheel, sha256="0" * 64)
    monkeypatch.setattr(interfaces, "INTERFACES", (dataclasses.replace(two[0], wheel=wheel),))
    with pytest.raises(
        FetchError, match=r"kolibri-1\.0\.whl of kolibri==1\.0 has SHA-256 [0-9a-f]{64}, expected 0{64}"
    ):
        interfaces.interface_pairs(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_nine_languages_and_a_licence_each():
    named = [lang for interface in interfaces.INTERFACES for lang in interface.languages.values()]
    assert sorted(named) == ["bn", "de", "es", "fr", "ja", "ru", "sw", "te", "zh"]
    assert {interface.licence for interface in interfaces.INTERFACES} == {"MIT", "BSD-3-Clause"}


def test_a_folder_is_of_one_choice(tmp_path):
    """Plans of before there was one are read as they were."""
    without, beside = Settings(steps=2).arguments(), Settings(steps=2, interfaces=True).arguments()
    assert "interfaces" not in without
    for given, other in ((without, beside), (beside, without)):
        keep(tmp_path / "plan.json", {"arguments": given})
        assert read_plan(tmp_path, given)["arguments"] == given
        with pytest.raises(ValueError, match="interfaces"):
            read_plan(tmp_path, other)
