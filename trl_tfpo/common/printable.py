# SPDX-License-Identifier: Apache-2.0

"""Texts of models, datasets and clients, made fit to be shown: nothing in them moves a cursor, or passes for markup."""

import html


def printable(text: str) -> str:
    """
    The text without anything that moves a cursor, colors a terminal or turns the direction of writing.

    Examples:

    ```python
    >>> from trl_tfpo.common.printable import printable
    >>> print(printable("good\\x1b[2J\\n"))
    good\\x1b[2J⏎

    ```
    """
    return "".join(x if x.isprintable() else "⏎" if x == "\n" else f"\\x{ord(x):02x}" for x in text)


def cell(text: str) -> str:
    """The text for a cell of a Markdown table: one line, with neither HTML nor links nor columns of its own."""
    escaped = html.escape(" ".join(printable(line) for line in text.splitlines()), quote=False)
    return "".join(f"\\{x}" if x in "|[]" else x for x in escaped)
