"""Whose `weight` does other code compute with? Read from the source of transformers' classes.

A module in INT8 has no matrix for its neighbours: what Mamba multiplies with `self.dt_proj.weight`
or RWKV divides in place must stay as it is. Asking for shape, dtype or device is no use of values,
and branches that a model never takes (by its own attributes, or only in training) do not count.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from torch import nn

NOT_READING = ("__init__", "_init_weights", "tie_weights", "_tie_weights", "reset_parameters")
"""Methods that read weights only while there is a model to build."""
ANSWERED = ("dtype", "device", "shape", "size", "ndim", "dim", "is_meta")
"""What a stand-in's `weight` answers without values."""
COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}
UNKNOWN: Any = object()


def weights_read(model: nn.Module) -> dict[int, str]:
    """id of each module whose `weight` other code computes with -> the class that does."""
    found: dict[int, str] = {}
    for module in model.modules():
        for path in _paths_read(module):
            for name, other in module.named_modules():
                if f".{name}".endswith(f".{path}"):
                    found.setdefault(id(other), type(module).__name__)
    return found


def _paths_read(module: nn.Module) -> set[str]:
    """Paths P for which methods of the module's class use the values of `<something>.P.weight`."""
    found: set[str] = set()
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for method in _methods(kind):
            live = list(_live(method.body, module))
            answered = {id(node) for part in live for node in _answered(part)}
            for node in (node for part in live for node in ast.walk(part)):
                if isinstance(node, ast.Attribute) and node.attr == "weight":
                    path = ast.unparse(node.value).partition(".")[2]
                    if path.isascii() and path.replace(".", "_").isidentifier():
                        found |= {path} if id(node) not in answered else set()
    return found


@lru_cache(maxsize=4096)
def _methods(kind: type) -> tuple[ast.FunctionDef, ...]:
    """Methods of a class that mention some other module's `weight`."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return ()
    if ".weight" not in source:
        return ()
    body = ast.parse(textwrap.dedent(source)).body[0]
    methods = [n for n in getattr(body, "body", []) if isinstance(n, ast.FunctionDef)]
    return tuple(m for m in methods if m.name not in NOT_READING and ".weight" in ast.unparse(m))


def _live(body: list[ast.stmt], module: nn.Module) -> Iterator[ast.AST]:
    """Statements and expressions that may run on `module`, without those that hold others."""
    for statement in body:
        if isinstance(statement, ast.If):
            taken = _value(statement.test, module)
            yield statement.test
            if taken is UNKNOWN or taken:
                yield from _live(statement.body, module)
            if taken is UNKNOWN or not taken:
                yield from _live(statement.orelse, module)
            continue
        blocks = [getattr(statement, name, None) for name in ("body", "orelse", "finalbody")]
        if not any(blocks):
            yield statement
            continue
        handlers = getattr(statement, "handlers", [])
        inner = (ast.stmt, ast.ExceptHandler)
        yield from (n for n in ast.iter_child_nodes(statement) if not isinstance(n, inner))
        for block in (*blocks, *(handler.body for handler in handlers)):
            yield from _live(block or [], module)


def _value(test: ast.expr, module: nn.Module) -> Any:
    """What a condition on the module's own attributes comes to, or UNKNOWN."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.Attribute):
        return _attribute(ast.unparse(test), module)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return UNKNOWN if value is UNKNOWN else not value
    if isinstance(test, ast.BoolOp):
        values = [_value(part, module) for part in test.values]
        decisive = isinstance(test.op, ast.Or)
        if any(value is not UNKNOWN and bool(value) is decisive for value in values):
            return decisive
        return UNKNOWN if UNKNOWN in values else not decisive
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        sides = [_value(part, module) for part in (test.left, test.comparators[0])]
        compare = COMPARED.get(type(test.ops[0]))
        if compare is not None and UNKNOWN not in sides:
            try:
                return compare(*sides)
            except TypeError:
                return UNKNOWN
    return UNKNOWN


def _attribute(path: str, module: nn.Module) -> Any:
    """A plain value of the module or its config; a loaded model is never in training."""
    if path == "self.training":
        return False
    value: Any = module
    for name in path.split(".")[1:] if path.startswith("self.") else ("",):
        value = getattr(value, name, UNKNOWN)
    return value if value is None or isinstance(value, bool | int | float | str) else UNKNOWN


def _answered(part: ast.AST) -> Iterator[ast.AST]:
    """Mentions of a weight that ask for no values."""
    for node in ast.walk(part):
        if isinstance(node, ast.Attribute) and node.attr in ANSWERED:
            yield node.value
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "hasattr"):
            yield from node.args
