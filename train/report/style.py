"""The style sheet of charts. Colours of lines: Okabe and Ito's, told apart with any common colour vision, lighter on dark."""

from __future__ import annotations

# The yellow of the palette is left out: on white it cannot be read.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07D00", "#3A9BD9", "#555555", "#882255")
_DARK = ("#56B4E9", "#F28E3C", "#2FCB9B", "#E08BC8", "#E6B800", "#8CD0FF", "#BBBBBB", "#DD77AA")
COLOURS = len(_LIGHT)


def style() -> str:
    """CSS of charts, beside that of all pages."""
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}"
    return f":root{{{_variables(_LIGHT)}}}{dark}{_CHARTS}" + "".join(
        f".s{number}{{stroke:var(--c{number})}}.f{number}{{fill:var(--c{number})}}text.c{number}{{fill:var(--c{number})}}"
        for number in range(1, COLOURS + 1)
    )


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours, 1))


_CHARTS = """
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:14px}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.tick{fill:var(--soft)}.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.faint{stroke-width:1;opacity:.3}.end{font-weight:600}
.dashed{stroke-dasharray:5 4}.leader{fill:none;stroke-width:1;opacity:.45}
.heat{fill:var(--c1);shape-rendering:crispEdges}
@media (max-width:560px){svg{font-size:13px}}
"""
