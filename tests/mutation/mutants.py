"""Makes a module's mutants: the same module with one small thing changed, wherever that can be.

Comparisons (the boundary, and the opposite), conditions (the opposite), ``and`` and ``or``,
arithmetic, whole numbers (one more and one less), ``True`` and ``False``, ``min`` and ``max``,
``any`` and ``all``, ``break`` and ``continue``; nothing is returned, and nothing is done. Left
as they are: asserts, annotations, strings, ``__slots__``, and what type checkers alone read.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

__all__ = ["Mutant", "mutants"]

OTHERS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.FloorDiv: (ast.Mult,),
    ast.Div: (ast.Mult,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Break: (ast.Continue,),
    ast.Continue: (ast.Break,),
}
CALLED_INSTEAD = {"min": "max", "max": "min", "any": "all", "all": "any"}
NO_EFFECT = ("__slots__", "__all__")


@dataclass(frozen=True)
class Mutant:
    """A module with one thing changed.

    Attributes:
        path: of the module's source.
        name: where it is, and what the line was and is; the same one as long as that stays.
        line: its number.
        code: of the whole module.
        in_function: whether it is in the body of a function.
    """

    path: Path
    name: str
    line: int
    code: CodeType
    in_function: bool


@dataclass(frozen=True)
class _Place:
    """Where an expression or a statement stands."""

    parent: ast.AST
    field: str
    index: int | None
    statement: ast.stmt
    scope: str
    in_function: bool

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants(path: Path) -> Iterator[Mutant]:
    """Give all mutants of a module, from its top to its end."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named: Counter[str] = Counter()
    for node, place in list(_walk(tree)):
        for other in _variants(node, place):
            before = _shown(place.statement, node)
            place.put(ast.copy_location(other, node))
            after = _shown(place.statement if place.statement is not node else other, other)
            code = compile(ast.fix_missing_locations(tree), str(path), "exec")
            place.put(node)
            name = f"{path.stem} {place.scope}: {before} -> {after}"
            named[name] += 1
            if named[name] > 1:
                name += f" ({named[name]})"
            yield Mutant(path, name, place.statement.lineno, code, place.in_function)


def _shown(statement: ast.AST, changed: ast.AST) -> str:
    """Give what a statement says, but for those that it contains; of a function, the default."""
    shown = changed if isinstance(statement, ast.FunctionDef) else statement
    return ast.unparse(shown).splitlines()[0]


def _walk(
    parent: ast.AST,
    scope: str = "",
    statement: ast.stmt | None = None,
    *,
    in_function: bool = False,
) -> Iterator[tuple[ast.AST, _Place]]:
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        is_body = isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) and field == "body"
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _is_left(node):
                continue
            own = node if isinstance(node, ast.stmt) else statement
            name = scope
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{scope}.{node.name}" if scope else node.name
            inside = in_function or is_body
            if own is not None and isinstance(node, (ast.expr, ast.stmt)):
                yield node, _Place(parent, field, index, own, name, inside)
            yield from _walk(node, name, own, in_function=inside)


def _is_left(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.Import() | ast.ImportFrom() | ast.JoinedStr():
            return True
        case ast.If(test=ast.Name("TYPE_CHECKING")):
            return True
        case ast.Assign([ast.Name(name)]):
            return name in NO_EFFECT
    return False


def _variants(node: ast.AST, place: _Place) -> Iterator[ast.AST]:
    """Give what may stand there instead."""
    match node:
        case ast.Compare(left, ops, comparators):
            for index, op in enumerate(ops):
                for other in OTHERS[type(op)]:
                    changed = [*ops[:index], other(), *ops[index + 1 :]]
                    yield ast.Compare(left, changed, comparators)  # type: ignore[arg-type]
        case ast.BinOp(left, op, right) if type(op) in OTHERS:
            yield ast.BinOp(left, OTHERS[type(op)][0](), right)  # type: ignore[arg-type]
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OTHERS[type(op)][0](), values)  # type: ignore[arg-type]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Call(ast.Name(name), arguments, keywords) if name in CALLED_INSTEAD:
            yield ast.Call(ast.Name(CALLED_INSTEAD[name], ast.Load()), arguments, keywords)
        case ast.Break() | ast.Continue():
            yield OTHERS[type(node)][0]()
        case ast.Return(ast.expr() as value) if not _is_false(value):
            yield ast.Return(ast.Constant(None))
        case ast.AugAssign(target, op, value):
            if type(op) in OTHERS:
                yield ast.AugAssign(target, OTHERS[type(op)][0](), value)  # type: ignore[arg-type]
            yield ast.Pass()
        case ast.Expr(ast.Call()) | ast.Delete() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets) if isinstance(targets[0], (ast.Attribute, ast.Subscript)):
            yield ast.Pass()
    is_condition = place.field == "test" or (place.field == "ifs")
    if is_condition and isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.NamedExpr)):
        yield ast.UnaryOp(ast.Not(), node)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or node.value is False)
