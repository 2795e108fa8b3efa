"""Draws ``judged.svg``, the README's picture of how a message is judged: ``python docs/picture.py``.

One column of boxes, 420 wide, so that a phone shows it at nearly full size; on a card of its own, so that it can be
read on a light and on a dark page. A test compares the file with what this draws.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FILE = Path(__file__).with_name("judged.svg")
WIDTH, LEFT, INNER = 420, 16, 388
INK, QUIET, LINE = "#1f2328", "#57606a", "#8c959f"
PLAIN, ASKED = ("#f3f5f8", "#8c959f"), ("#eef4ff", "#2563c9")
GOOD, DOUBT, BAD = ("#dff5e5", "#14602d"), ("#fff1d0", "#7a4b00"), ("#ffe3e0", "#a1251b")
TITLE, TEXT = 16, 14.5


def text(x: float, y: float, words: str, size: float = TEXT, colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" {more}>{escape(words)}</text>'


def box(y: float, height: float, colours: tuple[str, str]) -> str:
    fill, edge = colours
    place = f'x="{LEFT}" y="{y:g}" width="{INNER}" height="{height:g}" rx="8"'
    return f'<rect {place} fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'


def arrow(x: float, top: float, bottom: float, colour: str = LINE) -> str:
    head = f"M {x - 5:g} {bottom - 7:g} L {x:g} {bottom:g} L {x + 5:g} {bottom - 7:g}"
    return f'<path d="M {x:g} {top:g} V {bottom:g} {head}" fill="none" stroke="{colour}" stroke-width="1.8"/>'


def block(
    y: float, colours: tuple[str, str], title: str, lines: tuple[str, ...] = (), colour: str = INK
) -> tuple[str, float]:
    """A box with a title and lines below it, and where it ends."""
    height = 32 + 20 * len(lines) + (4 if lines else 0)
    parts = [box(y, height, colours), text(LEFT + 14, y + 22, title, TITLE, colour, 'font-weight="600"')]
    parts += [text(LEFT + 14, y + 43 + 20 * at, line, TEXT, colour) for at, line in enumerate(lines)]
    return "\n".join(parts), y + height


def mesh(top: float) -> str:
    """Three stages, three columns; one worker's message is not as the others'."""
    columns, rows = (150, 240, 330), (top + 14, top + 68, top + 122)
    parts = []
    for number, x in enumerate(columns):
        parts.append(text(x, top - 12, f"column {number}", TEXT, QUIET, 'text-anchor="middle"'))
        for stage in (0, 1):
            tampered = (number, stage) == (2, 1)
            parts.append(arrow(x, rows[stage] + 13, rows[stage + 1] - 14, BAD[1] if tampered else LINE))
        for stage, y in enumerate(rows):
            fill, edge = BAD if (number, stage) == (2, 1) else PLAIN
            parts.append(f'<circle cx="{x}" cy="{y:g}" r="12" fill="{fill}" stroke="{edge}" stroke-width="1.8"/>')
    parts += [text(LEFT + 14, y + 5, f"stage {stage}", TEXT, QUIET) for stage, y in enumerate(rows)]
    return "\n".join(parts)


def picture() -> str:
    """The whole SVG."""
    middle, right = LEFT + INNER / 2, LEFT + INNER
    parts = [mesh(84)]
    drawn, end = block(
        234,
        PLAIN,
        "Every message is read in passing",
        (
            "at both ends: checksum and statistics",
            "by neighbours: secret sketches of what",
            "went into a stage and what came out",
        ),
    )
    parts += [drawn, arrow(middle, end, end + 22)]
    drawn, end = block(end + 22, PLAIN, "All ranks get the same evidence")
    parts += [drawn, arrow(middle, end, end + 22)]

    drawn, end = block(end + 22, ASKED, "Do both ends report the same?")
    parts.append(drawn)
    drawn, end = block(
        end,
        DOUBT,
        "no: DISPUTE",
        ("column left out of this step; its two ends", "get other partners in the next"),
        DOUBT[1],
    )
    parts += [drawn, arrow(middle, end, end + 26), text(middle + 10, end + 18, "yes", TEXT, QUIET)]

    drawn, end = block(end + 26, ASKED, "Is it within the fences?")
    parts.append(drawn)
    alarm = end + 28
    drawn, end = block(
        end, DOUBT, "no: ALARM", ("column left out of this step; the first", "in the flow becomes a suspect"), DOUBT[1]
    )
    parts += [drawn, arrow(middle, end, end + 26), text(middle + 10, end + 18, "yes", TEXT, QUIET)]
    drawn, end = block(end + 26, GOOD, "It counts", ("DeepSpeed reduces and steps as always",), GOOD[1])
    parts.append(drawn)

    tried = end + 34
    around = f"M {right} {alarm:g} h 8 V {end + 17:g} H {middle:g}"
    parts.append(f'<path d="{around}" fill="none" stroke="{DOUBT[1]}" stroke-width="1.8" stroke-dasharray="5 4"/>')
    parts += [arrow(middle, end + 17, tried, DOUBT[1]), text(LEFT + 14, end + 22, "suspects are tried", TEXT, DOUBT[1])]
    drawn, end = block(
        tried,
        PLAIN,
        "Twin step: the same data for all",
        ("honest workers of a stage then send", "the same bits, forward and backward"),
    )
    parts.append(drawn)
    drawn, end = block(end, ASKED, "Does it do what its stage does?")
    parts.append(drawn)
    drawn, end = block(end, GOOD, "yes: CLEARED", (), GOOD[1])
    parts.append(drawn)
    drawn, end = block(
        end, BAD, "no: PROVED, CONVICTED", ("named by rank, host and GPU; training goes", "on around it"), BAD[1]
    )
    parts.append(drawn)

    height = end + 18
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" \
viewBox="0 0 {WIDTH} {height:g}" role="img" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif">
<title>How a message is judged</title>
<desc>A message that crosses a stage boundary is read at both ends. Where the ends differ there is a dispute, where it
lies outside the fences an alarm; in both cases its column is left out of the step. Suspects are tried in a twin step,
in which all columns get the same data, and cleared or convicted by exact comparison.</desc>
<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2:g}" rx="12" fill="#ffffff" stroke="#d0d7de"/>
{text(LEFT, 36, "How a message is judged", 20, INK, 'font-weight="700"')}
{body}
</svg>
"""


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
    print(FILE)
