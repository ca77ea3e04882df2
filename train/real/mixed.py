"""Wordings that write a number in words or in digits."""

from dataclasses import dataclass, fields, replace

from layalign.train.demo.wording import Wording, spell


@dataclass(frozen=True, kw_only=True)
class MixedWording(Wording):
    """A Wording with a choice of how numbers are written; `agree` is given the digits too and must leave them alone."""

    digits: bool = False

    def written(self, digits: bool) -> "MixedWording":
        """The same wording with numbers in digits or in words."""
        return replace(self, digits=digits)

    def _agreeing(self, number: int, forms: dict[str, str]) -> str:
        return self.agree(str(number) if self.digits else spell(number, self.code), number, forms)


def extended(wording: Wording, **more: tuple) -> MixedWording:
    """A demo wording with further names, nouns and patterns behind its own."""
    own = {field.name: getattr(wording, field.name) for field in fields(Wording)}
    return MixedWording(**own | {name: own[name] + values for name, values in more.items()})
