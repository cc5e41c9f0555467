"""The mutants of a source: one small change each, found in its syntax tree (see mutate.py)."""

import ast
import hashlib
from dataclasses import dataclass
from typing import Any

OPERATORS = {
    ast.Lt: ("<", "<=", ">="),
    ast.LtE: ("<=", "<", ">"),
    ast.Gt: (">", ">=", "<="),
    ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
"""An operator's spelling, and what stands in its place."""
NAMES = {"min": "max", "any": "all", "ceil": "floor", "minimum": "maximum", "chosen": "rejected"}
NAMES |= {"reference_chosen": "reference_rejected", "chosen_reward": "rejected_reward", "policy": "reference"}
NAMES |= {other: name for name, other in NAMES.items()}
"""Names that are taken for one another."""
MESSAGES = {"say", "warn", "progress"}
"""Calls whose arguments are words for people: only their removal counts."""
COMMUTATIVE = {"transpose", "min", "max", "minimum", "maximum"}
"""Calls whose two arguments may change places."""


@dataclass(frozen=True)
class Mutant:
    """One change: characters [start, end) of a file become `text`."""

    file: str
    start: int
    end: int
    text: str
    line: int
    first: int
    last: int
    """The first and the last line of its statement."""
    in_function: bool

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def key(self, source: str) -> str:
        return hashlib.sha256(f"{self.file}\n{self.apply(source)}".encode()).hexdigest()[:16]

    def words(self, source: str) -> str:
        before = " ".join(source[self.start : self.end].split())
        return f"{self.file}:{self.line}  {before or '(nothing)'}  ->  {' '.join(self.text.split()) or '(nothing)'}"


class Finder(ast.NodeVisitor):
    """Collects the mutants of a source."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source, self.found = file, source, list[Mutant]()
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line.encode()))
        self._bytes = source.encode()
        self._statement: ast.stmt | None = None
        self._depth = 0
        self.visit(ast.parse(source))

    def _place(self, line: int, column: int) -> int:
        return len(self._bytes[: self._starts[line - 1] + column].decode())

    def _span(self, node: Any) -> tuple[int, int]:
        return self._place(node.lineno, node.col_offset), self._place(node.end_lineno, node.end_col_offset)

    def _text(self, node: Any) -> str:
        start, end = self._span(node)
        return self.source[start:end]

    def _add(self, start: int, end: int, text: str) -> None:
        statement = self._statement
        assert statement is not None
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        if isinstance(statement, ast.If | ast.For | ast.While | ast.With | ast.FunctionDef | ast.ClassDef | ast.Try):
            last = max(first, statement.body[0].lineno - 1)  # the head alone
        line = 1 + self.source.count("\n", 0, start)
        self.found.append(Mutant(self.file, start, end, text, line, first, last, self._depth > 0))

    def _swap(self, node: ast.AST, text: str) -> None:
        self._add(*self._span(node), text)

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        outer, self._statement = self._statement, node
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (docstring or for_types or isinstance(node, ast.Import | ast.ImportFrom | ast.Assert)):
            self._whole(node)
            super().visit(node)
        self._statement = outer

    def _whole(self, node: ast.stmt) -> None:
        """Mutants that a statement is to be replaced as a whole for."""
        stored = isinstance(node, ast.Assign) and all(
            isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets
        )
        left_out = isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Continue | ast.Break | ast.Delete)
        if (left_out or stored) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield)):
            self._swap(node, "pass")
        if isinstance(node, ast.Return) and node.value is not None and self._text(node.value) != "None":
            self._swap(node, "return None")
        if isinstance(node, ast.If):
            self._swap(node.test, f"not ({self._text(node.test)})")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self._depth += 1
        for statement in node.body:
            self.visit(statement)
        self._depth -= 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """What is said is no matter of arithmetic."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A message."""

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
            self._operator(operator, left, right)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._operator(node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._operator(node.op, left, right)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._operator(node.op, node.target, node.value)
        self.generic_visit(node)

    def _operator(self, operator: ast.AST, left: ast.AST, right: ast.AST) -> None:
        spelling, *others = OPERATORS.get(type(operator), ("",))
        start = self._span(left)[1]
        for text in others:
            place = start + self.source[start : self._span(right)[0]].index(spelling)
            self._add(place, place + len(spelling), text)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._swap(node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._swap(node.test, f"not ({self._text(node.test)})")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._swap(test, f"not ({self._text(test)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._swap(node, str(not value))
        elif isinstance(value, int):
            self._swap(node, str(value + 1))
            self._swap(node, f"({value - 1})")
        elif isinstance(value, float):
            self._swap(node, repr(value * 2 or 0.5))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES and isinstance(node.ctx, ast.Load):
            self._swap(node, NAMES[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in NAMES and isinstance(node.ctx, ast.Load):
            end = self._span(node)[1]
            self._add(end - len(node.attr), end, NAMES[node.attr])
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self._swap(bound, f"({self._text(bound)}) + 1")
        self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # of zip: an assertion
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in MESSAGES:
            return
        plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if len(plain) >= 2 and plain[:2] == node.args[:2] and name not in COMMUTATIVE:
            first, second = plain[:2]
            start, end = self._span(first)[0], self._span(second)[1]
            between = self.source[self._span(first)[1] : self._span(second)[0]]
            if self._text(first) != self._text(second):
                self._add(start, end, self._text(second) + between + self._text(first))
        arguments: list[Any] = sorted([*node.args, *node.keywords], key=lambda one: self._span(one))
        for number, argument in enumerate(arguments):
            if isinstance(argument, ast.keyword) and argument.arg not in (None, "strict"):
                start, end = self._span(argument)
                if number + 1 < len(arguments):
                    end = self._span(arguments[number + 1])[0]
                elif number:
                    start = self._span(arguments[number - 1])[1]
                self._add(start, end, "")
        self.generic_visit(node)
