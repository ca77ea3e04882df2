"""The wording of each language, English first."""

from layalign.train.demo.templates import bn, de, en, es, fr, sw, th, zh

WORDINGS = {module.WORDING.code: module.WORDING for module in (en, de, es, fr, zh, sw, bn, th)}
