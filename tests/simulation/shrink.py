"""Makes a program that fails smaller, as long as it fails.

Tasks, steps, and what the limiter is given are taken out, whole halves first; blocks are
replaced by what is in them, values by what they are by default, and numbers by smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from .programs import Component, Program, Settings, Step, Task

__all__ = ["shrink"]


def shrink(program: Program, fails: Callable[[Program], bool], *, most_runs: int = 3000) -> Program:
    """Give a smaller program that fails, too; none of those next to it does.

    Args:
        program: one that fails.
        fails: runs a program, and says whether it fails in the same way.
        most_runs: how many to run at the most.
    """
    left = most_runs
    start, is_smaller = 0, False
    while True:
        for place, smaller in enumerate(_smaller(program)):
            if place < start:
                continue  # that did not help a moment ago
            left -= 1
            if left < 0:
                return program
            if fails(smaller):
                program, start, is_smaller = smaller, place, True
                break
        else:
            if not is_smaller:
                return program
            start, is_smaller = 0, False


def _smaller(program: Program) -> Iterator[Program]:
    for tasks in _fewer(program.tasks):
        yield replace(program, tasks=tasks)
    for number, task in enumerate(program.tasks):
        for less in _smaller_task(task):
            yield replace(program, tasks=_with(program.tasks, number, less))
    for name in ("reclaim", "channels"):
        for parts in _fewer(getattr(program, name)):
            yield _replaced(program, name, parts)
    for components in _fewer(program.components):
        if components:
            yield replace(program, components=components)
    for name in ("settings", "probe"):
        for less in _plainer(getattr(program, name)):
            yield _replaced(program, name, less)
    for name in ("reclaim", "channels", "components"):
        parts = getattr(program, name)
        for number, part in enumerate(parts):
            for less in _plainer(part):
                yield _replaced(program, name, _with(parts, number, less))


def _fewer(parts: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Give a tuple with a half, a quarter, ... one of its parts left out."""
    size = len(parts)
    while size:
        for start in range(0, len(parts), size):
            yield parts[:start] + parts[start + size :]
        size //= 2


def _replaced(value: Any, name: str, part: object) -> Any:
    return replace(value, **{name: part})


def _with(parts: tuple[Any, ...], number: int, part: object) -> tuple[Any, ...]:
    return (*parts[:number], part, *parts[number + 1 :])


def _smaller_task(task: Task) -> Iterator[Task]:
    for steps in _smaller_steps(task.steps):
        yield replace(task, steps=steps)
    yield from _plainer(task)


def _smaller_steps(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    yield from _fewer(steps)
    for number, step in enumerate(steps):
        inner: tuple[Step, ...] = getattr(step, "steps", ())
        if inner:
            yield steps[:number] + inner + steps[number + 1 :]
            for fewer in _smaller_steps(inner):
                yield _with(steps, number, _replaced(step, "steps", fewer))
        for less in _plainer(step):
            yield _with(steps, number, less)


def _plainer(value: Any) -> Iterator[Any]:
    """Give it with one of its fields as it is by default, or smaller."""
    for field in fields(value):
        now = getattr(value, field.name)
        if field.name == "steps" or now == field.default:
            continue
        if isinstance(field.default, (bool, int, float, str, tuple, type(None))):
            yield _replaced(value, field.name, field.default)
        if isinstance(now, tuple):
            for fewer in _fewer(now):
                yield _replaced(value, field.name, fewer)
        elif isinstance(now, int) and not isinstance(now, bool):
            for less in sorted({1, now // 2, now - now // 10, now - 1}):
                if 0 < less < now and not (isinstance(value, (Settings, Component)) and less < 2):
                    yield _replaced(value, field.name, less)
