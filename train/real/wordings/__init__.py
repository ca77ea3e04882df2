"""The wording of each language of the real run, English first: seven patterns a part, the last of them for evaluation."""

from layalign.train.real.wordings import bn, de, en, es, fr, ja, ru, sw, th, zh

WORDINGS = {module.WORDING.code: module.WORDING for module in (en, de, es, fr, sw, bn, th, zh, ru, ja)}
