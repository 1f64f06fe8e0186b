"""The messages that philens raises or warns with, from its source, and the page that lists them.

What varies in a message is a hole here and an UPPERCASE word in the docs: `There is no file {path}; check the
path.` is listed as `There is no file PATH; check the path.`

python -m releasing.messages FILE    writes the page, as `make docs` does
"""

import ast
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import philens
from philens.support import errors

SOURCE = Path(philens.__file__).parent
ERRORS = dict(inspect.getmembers(errors, inspect.isclass))

# What varies in a message, with a word for it.
HOLE = re.compile("\0([A-Z0-9_]+)\0")
WORD = "[A-Z][A-Z0-9_]*"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """The messages of one source file, each with holes where it varies."""

    def __init__(self, path: Path) -> None:
        self.place = path.relative_to(SOURCE).as_posix()
        self.tree = ast.parse(path.read_text())
        self.above = {below: node for node in ast.walk(self.tree) for below in ast.iter_child_nodes(node)}
        self.calls = defaultdict(list)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                self.calls[ast.unparse(node.func)].append(node)

    def messages(self, whole: bool = False) -> Iterator[tuple[str, str]]:
        """Message and place; `whole` fills holes with the texts that the function puts into them."""
        for name, node in [(name, node) for name, calls in self.calls.items() for node in calls if node.args]:
            if re.fullmatch(r"log\w*\.(warning|error)|warnings\.warn", name):
                texts = self.texts(node.args[0], whole)
                for argument in node.args[1:]:
                    texts = [
                        re.sub(r"%[\d.]*[sdg]", f"\0{word(argument)}\0", text, count=1) for text in texts
                    ]
            elif name in ERRORS or name == "type(error)":
                texts = self.texts(node.args[0], whole)
            else:
                continue
            for text in texts:
                # Others' messages passed on, such as InputError(str(error)), are not messages.
                if re.search(r"[a-z]{2}", HOLE.sub("", text)):
                    yield text, f"{self.place}:{node.lineno}"

    def texts(self, node: ast.expr, whole: bool) -> list[str]:
        """The texts that an expression can be."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(one) for one in product(*(self.texts(part, whole) for part in parts))]
            case ast.FormattedValue(value=ast.Name(id=name) as value, conversion=-1):
                if whole or name.lstrip("_").isupper():
                    return self.texts(value, whole)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return [a + b for a, b in product(self.texts(left, whole), self.texts(right, whole))]
            case ast.IfExp(body=body, orelse=other):
                return self.texts(body, whole) + self.texts(other, whole)
            case ast.Call(func=ast.Attribute(attr="format", value=value)):
                return [re.sub(r"\{\w*\}", "\0VALUE\0", text) for text in self.texts(value, whole)]
            case ast.Name(id=name):
                values = self.values(node, name)
                if values and not any(name in map(ast.unparse, ast.walk(value)) for value in values):
                    return [text for value in values for text in self.texts(value, whole)]
        return [f"\0{word(node)}\0"]

    def values(self, node: ast.AST, name: str) -> list[ast.expr]:
        """What a name is set to in the function around a node, else by that function's callers, else in the
        module."""
        scope = node
        while not isinstance(scope, Function | ast.Module):
            scope = self.above[scope]
        if values := [value for found, value in assigned(scope) if found == name]:
            return values
        if isinstance(scope, Function):
            names = [argument.arg for argument in scope.args.args]
            if name in names:
                place = names.index(name)
                return [call.args[place] for call in self.calls[scope.name] if len(call.args) > place]
        return constants().get((self.place, name)) or constants().get(("", name), [])


def assigned(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names and what they are set to, in a function or at the top of a module."""
    for node in ast.walk(scope) if isinstance(scope, Function) else ast.iter_child_nodes(scope):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from ((ast.unparse(name), value) for name, value in zip(names, values, strict=False))
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                | ast.NamedExpr(target=ast.Name(id=name), value=value)
            ):
                yield name, value


def word(node: ast.AST) -> str:
    """A word for what an expression puts into a message."""
    match node:
        case ast.FormattedValue(value=value) | ast.BinOp(left=value) | ast.Subscript(value=value):
            return word(value)
        case ast.Attribute(attr="__name__"):
            return "KIND"
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").upper() or "VALUE"
        case ast.Call(func=ast.Name(id="len")):
            return "COUNT"
        case ast.Call(args=[value, *_]):
            return word(value)
        case _:
            return "VALUE"


@cache
def modules() -> list[Module]:
    """All source files."""
    return [Module(path) for path in sorted(SOURCE.rglob("*.py"))]


@cache
def constants() -> dict[tuple[str, str], list[ast.expr]]:
    """Constants by module and name, and below "" the texts that modules take from one another; a name that
    means two things is none of those."""
    found: dict[tuple[str, str], list[ast.expr]] = defaultdict(list)
    for module in modules():
        for name, value in assigned(module.tree):
            found[module.place, name].append(value)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found["", name].append(value)
    return {key: values for key, values in found.items() if key[0] or len(values) == 1}


def as_documented(message: str) -> str:
    """A message as its entry has it."""
    return HOLE.sub(r"\1", re.sub("(\0[A-Z0-9_]+\0)+", r"\1", message))


def pattern(message: str) -> str:
    """The form of a message's entry, as a regular expression: whatever the words for what varies."""
    literal = re.split("(?:\0[A-Z0-9_]+\0)+", message)
    return WORD.join(map(re.escape, literal))


@cache
def all_messages() -> dict[str, list[str]]:
    """By the form of its entry, each message as the docs have it, and its places."""
    found: dict[str, list[str]] = {}
    for module in modules():
        for message, place in module.messages():
            found.setdefault(pattern(message), [as_documented(message)]).append(place)
    return found


def page() -> str:
    """Every message below the room that says it."""
    rooms = defaultdict(list)
    for message, place, *_ in all_messages().values():
        rooms[place.partition("/")[0]].append(quoted(message))
    lines = [
        "# All messages",
        "",
        "By the part of the program that says them. What varies stands in capitals.",
        "",
    ]
    for room in sorted(rooms):
        lines += [f"## {room}", "", *(f"- {message}" for message in sorted(rooms[room])), ""]
    return "\n".join(lines)


def quoted(message: str) -> str:
    """A message as code in Markdown."""
    return message.join(("`` ", " ``") if "`" in message else ("`", "`"))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
