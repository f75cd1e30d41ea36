# SPDX-License-Identifier: Apache-2.0

"""
Heat map of tokens, each with a number, for terminals and notebooks.

Each colored token also has a sign, for readers who cannot see the colors. Control characters and HTML in the texts are
escaped.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .printable import printable


GREEN, RED = (0, 136, 68), (204, 51, 51)


@dataclass(frozen=True)
class TokenMap:
    """
    Heat map of tokens, each with a number. `print` it, or return it from a notebook cell.

    Args:
        rows (sequence of `(title, tokens, values, notes)`):
            Texts, one below the other, with a value and a note for each token. The value with the largest magnitude
            has the strongest color.
        legend (`str`):
            Meaning of the values.
    """

    rows: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[str]]]
    legend: str

    @property
    def _scale(self) -> float:
        return max((abs(x) for _, _, values, _ in self.rows for x in values if math.isfinite(x)), default=0) or 1.0

    def _strength(self, value: float) -> float:
        """Scale a value to [-1, 1]; NaN becomes zero."""
        return 0.0 if math.isnan(value) else max(-1.0, min(1.0, value / self._scale))

    def __rich__(self) -> Text:
        """Text for [rich](https://rich.readthedocs.io) consoles."""
        text = Text()
        for title, tokens, values, _ in self.rows:
            text.append(f"{printable(title)}: ", style="bold")
            for token, value in zip(tokens, values, strict=True):
                strength = self._strength(value)
                color = GREEN if strength > 0 else RED
                shade = [round(255 + (channel - 255) * abs(strength)) for channel in color]
                style = f"black on rgb({shade[0]},{shade[1]},{shade[2]})" if strength else ""
                text.append(printable(token) + _sign(strength), style=style)
            text.append("\n")
        return text.append(printable(self.legend), style="dim")

    def __str__(self) -> str:
        console = Console(soft_wrap=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def table(self) -> str:
        """Return all tokens with their notes, one line each."""
        lines = []
        for title, tokens, _, notes in self.rows:
            width = max((len(printable(token)) for token in tokens), default=0)
            lines += [
                printable(title),
                *(f"  {printable(x):<{width}}  {printable(note)}" for x, note in zip(tokens, notes, strict=True)),
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """HTML for notebooks. The tooltip of a token is its note."""
        lines = []
        for title, tokens, values, notes in self.rows:
            spans = []
            for token, value, note in zip(tokens, values, notes, strict=True):
                strength = self._strength(value)
                color = GREEN if strength > 0 else RED
                background = f"rgba({color[0]},{color[1]},{color[2]},{abs(strength):.2f})"
                spans.append(
                    f'<span style="background:{background}" title="{html.escape(printable(note))}">'
                    f"{html.escape(printable(token))}<sup>{_sign(strength)}</sup></span>"
                )
            lines.append(
                f"<p><b>{html.escape(printable(title))}</b> "
                f'<span style="white-space:pre-wrap">{"".join(spans)}</span></p>'
            )
        return f'<div class="trl-tfpo">{"".join(lines)}<p><small>{html.escape(self.legend)}</small></p></div>'


def _sign(strength: float) -> str:
    return "⁺" if strength > 0 else "⁻" if strength < 0 else ""


def token_texts(ids: Sequence[int], processing_class: PreTrainedTokenizerBase) -> list[str]:
    """Text of each token, or name of a special token. A character of several tokens belongs to the last of them."""
    special, before = set(processing_class.all_special_ids), ""
    pieces: list[str] = []
    for end, token_id in enumerate(ids, start=1):
        if token_id in special:
            pieces.append(f" {processing_class.convert_ids_to_tokens(token_id)}")
            continue
        text = str(processing_class.decode([i for i in ids[:end] if i not in special]))
        if text.endswith("\ufffd"):
            pieces.append("")
            continue
        pieces.append(text[len(before) :] if text.startswith(before) else str(processing_class.decode([token_id])))
        before = text
    return pieces
