"""Letters in figures: matplotlib's own font has none of Chinese, Japanese, Thai, Bengali and many others."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names of fonts that have the letters of many languages: they are looked into first.
_WIDE = ("cjk", "noto sans", "unifont", "unicode", "fallback", "hei", "gothic")
# TeX's fonts have their own numbers of letters, one font has a box for every letter, and colours cannot be drawn.
_UNFIT = ("cm", "stixnon", "stixsiz", "last resort")


def legible(words: str) -> str:
    """A label as matplotlib can show it: letters that no font of this machine has by their numbers (U+5730), and nothing that it
    takes for mathematics ($) or leaves out of legends (a leading _).
    """
    _, left = _fallbacks(frozenset(words))
    words = "".join(f"U+{ord(letter):04X}" if letter in left else letter for letter in words).replace("$", r"\$")
    return f"\u200b{words}" if words.startswith("_") else words


def lacking(words: str) -> bool:
    """Whether no font of this machine has some letter of it."""
    return bool(_fallbacks(frozenset(words))[1])


def choose_fonts(figure: Figure) -> None:
    """Give a figure's texts those fonts of the machine that have the letters which its own one lacks."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families, _ = _fallbacks(frozenset("".join(text.get_text() for text in texts)))
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])


@cache
def _fallbacks(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """The families that have what the usual font lacks of these letters, and the letters that none has."""
    left = {letter for letter in letters if not letter.isascii() and letter.isprintable()}
    families: list[str] = []
    if not left:
        return families, frozenset()
    from matplotlib import font_manager

    left -= _letters(font_manager.findfont(font_manager.FontProperties()))
    files = _files() if left else {}
    for name in sorted(files, key=lambda name: (not any(word in name.lower() for word in _WIDE), name)):
        has = left & _letters(files[name]) if left else None
        if has:
            families.append(name)
            left -= has
    return families, frozenset(left)


@cache
def _files() -> dict[str, str]:
    """{family: the file of its upright face}; fonts that were installed since matplotlib made its list are added to it."""
    from matplotlib import font_manager

    fonts = font_manager.fontManager
    for file in set(font_manager.findSystemFonts()) - {entry.fname for entry in fonts.ttflist}:
        with suppress(OSError, RuntimeError):  # broken, or of a kind that it does not read
            fonts.addfont(file)
    found: dict[str, str] = {}
    for entry in fonts.ttflist:
        name = entry.name.lower()
        if entry.weight == 400 and entry.style == "normal" and not name.startswith(_UNFIT) and "emoji" not in name:
            found.setdefault(entry.name, entry.fname)
    return found


@cache
def _letters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(file).get_charmap()))
