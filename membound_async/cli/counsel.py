"""Advice in words: what a program had better declare."""

from __future__ import annotations

from membound_async.advice import ENOUGH_SECONDS, Advice, time_in_words

from .layout import paragraph

__all__ = ["counsel"]

MOST = 10
"""How many components the report at the end of a program speaks of; the JSON has them all."""


def counsel(advice: Advice, columns: int, *, everything: bool = False) -> list[str]:
    """Give advice in lines; none if there is nothing to say.

    Args:
        advice: of ``advise()``.
        columns: of the terminal.
        everything: name also those that may stay as they are, and never be silent.
    """
    changes = advice.changes
    shown = changes if everything else changes[:MOST]
    said = [*advice.notes, *(f"{one.path}: {one.reason}" for one in shown)]
    if len(changes) > len(shown):
        said.append(f"... and {len(changes) - len(shown)} more")
    if everything:
        if advice.seconds < ENOUGH_SECONDS:
            said.append(
                f"too little seen yet: it runs for {time_in_words(advice.seconds)}, "
                f"{time_in_words(ENOUGH_SECONDS)} are the least"
            )
        else:
            said += _others(advice)
    text: list[str] = []
    for number, saying in enumerate(said):
        label = "" if number or everything else "advice"
        indent = 2 if everything else 10
        text += paragraph(
            saying, columns, label=f"{label:<{indent}}" if not everything else "", indent=indent
        )
    return text


def _others(advice: Advice) -> list[str]:
    said: list[str] = []
    for verdict, words in (
        ("keep", "stays as it is"),
        ("too little seen", "too little seen to say anything"),
    ):
        paths = [one.path for one in advice.components if one.verdict == verdict]
        if paths:
            said.append(f"{words}: {', '.join(paths)}")
    return said
