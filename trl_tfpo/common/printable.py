# SPDX-License-Identifier: Apache-2.0

"""Escaping of texts from models, datasets and clients for terminals and Markdown tables."""

import html


def printable(text: str) -> str:
    """
    Escape characters that are not printable. They can move the cursor, color the terminal or reverse the text.

    A line break becomes `⏎`.

    Examples:

    ```python
    >>> from trl_tfpo.common.printable import printable
    >>> print(printable("good\\x1b[2J\\n"))
    good\\x1b[2J⏎

    ```
    """
    return "".join(x if x.isprintable() else "⏎" if x == "\n" else f"\\x{ord(x):02x}" for x in text)


def cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table: one line, without HTML, links or column separators."""
    escaped = html.escape(" ".join(printable(line) for line in text.splitlines()), quote=False)
    return "".join(f"\\{x}" if x in "|[]" else x for x in escaped)
