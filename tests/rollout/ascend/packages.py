"""What packages define, read from their sources: nothing is imported, so versions can be compared that exclude each
other."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

Function = ast.FunctionDef | ast.AsyncFunctionDef
FIELDS = {"TypedDict", "NamedTuple", "Struct", "BaseModel"}
"""Bases that make fields of a class arguments of its constructor, as decorators of dataclasses do."""


@dataclass
class Module:
    """A source file: what each of its names stands for (the last definition counts), functions and classes left out."""

    name: str
    is_package: bool
    tree: ast.Module
    names: dict[str, ast.AST] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in _statements(self.tree):
            for name in _bound(node):
                self.names[name] = node


class Found(NamedTuple):
    """A definition (a class, function or assignment), or a module where `node` is None."""

    module: Module
    node: ast.AST | None


class Arguments(NamedTuple):
    """What can be called with: names by position or keyword, names by keyword alone, those of both that must be given,
    and whether *arguments (more) and **options are taken."""

    names: list[str]
    by_keyword: list[str]
    needed: list[str]
    more: bool
    options: bool


class Packages:
    """The packages in some folders, the first that has a module counts."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        self.module = functools.cache(self._module)

    def _module(self, name: str) -> Module | None:
        for folder in self._folders:
            path = folder.joinpath(*name.split("."))
            for file, is_package in ((path / "__init__.py", True), (path.with_suffix(".py"), False)):
                if file.is_file():
                    return _parsed(file, name, is_package)
        return None

    def holds(self, name: str) -> bool:
        """Whether a module's package is one of these."""
        return self.module(name.partition(".")[0]) is not None

    def find(self, module: str, name: str, depth: int = 12) -> Found | None:
        """What `from module import name` gives; None where there is nothing of this name."""
        source = self.module(module)
        if source is None or depth == 0:
            return None
        node = source.names.get(name)
        if node is None:
            beneath = self.module(f"{module}.{name}")
            return self._through_stars(source, name, depth) if beneath is None else Found(beneath, None)
        return self._followed(source, node, name, depth)

    def _followed(self, source: Module, node: ast.AST, name: str, depth: int) -> Found | None:
        """The definition behind an import, or behind another name for it."""
        if isinstance(node, ast.ImportFrom):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            origin = absolute(source, node)
            return self.find(origin, original, depth - 1) if self.holds(origin) else Found(source, node)
        if isinstance(node, ast.Import):
            alias = next(alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) == name)
            module = self.module(alias.name if alias.asname else name)
            return Found(source, node) if module is None else Found(module, None)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id != name:
            return self.find(source.name, node.value.id, depth - 1)
        return Found(source, node)

    def _through_stars(self, source: Module, name: str, depth: int) -> Found | None:
        for node in _statements(source.tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                found = self.find(absolute(source, node), name, depth - 1)
                if found:
                    return found
        return None

    def member(self, owner: Found, name: str) -> Found | None:
        """An attribute of a module, of a class, or of what an annotation says that a name holds."""
        if owner.node is None:
            return self.find(owner.module.name, name)
        for kind in self.bases(owner):
            assert isinstance(kind.node, ast.ClassDef)
            node = _members(kind.node).get(name)
            if node is not None:
                return Found(kind.module, node)
        ancestors = {_last_name(base) for kind in self.bases(owner) for base in kind.node.bases}  # type: ignore[union-attr]
        if "Module" in ancestors and hasattr(torch.nn.Module, name):
            return owner
        return None

    def bases(self, owner: Found) -> Iterator[Found]:
        """A class and those that it is derived from, as far as the packages have them."""
        if isinstance(owner.node, ast.AnnAssign):
            owner = self.find(owner.module.name, _last_name(owner.node.annotation)) or owner
        if not isinstance(owner.node, ast.ClassDef):
            return
        yield owner
        for base in owner.node.bases:
            name = _last_name(base)
            found = self.find(owner.module.name, name) if name in owner.module.names else None
            if found is not None and found.node is not owner.node:
                yield from self.bases(found)

    def refusal(self, called: Found, positional: int, keywords: list[str]) -> str | None:
        """Why a call does not bind; None where it does, or where nothing is known of the arguments.

        Methods are called on an instance: their first argument is not counted.
        """
        given = self._arguments(called)
        if given is None:
            return None
        if positional > len(given.names) and not given.more:
            return f"takes {len(given.names)} arguments by position, not {positional}"
        unknown = [name for name in keywords if name not in (*given.names, *given.by_keyword)]
        if unknown and not given.options:
            return f"has no argument {', '.join(unknown)}"
        missing = [name for name in given.needed if name not in given.names[:positional] and name not in keywords]
        return f"needs {', '.join(missing)}" if missing else None

    def _arguments(self, called: Found) -> Arguments | None:
        if isinstance(called.node, ast.ClassDef):
            if any(_makes_fields(kind.node) for kind in self.bases(called)):
                fields = [name for kind in reversed([*self.bases(called)]) for name in _fields(kind.node)]
                return Arguments(fields, [], [], more=False, options=False)
            maker = self.member(called, "__init__")
            return self._arguments(maker) if maker else None
        if not isinstance(called.node, Function):
            return None
        given, decorators = called.node.args, {_last_name(item) for item in called.node.decorator_list}
        names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
        needed = names[: len(names) - len(given.defaults)]
        if names and names[0] in ("self", "cls") and "staticmethod" not in decorators:
            names, needed = names[1:], needed[1:]
        by_keyword = [argument.arg for argument in given.kwonlyargs]
        needed += [name for name, default in zip(by_keyword, given.kw_defaults, strict=True) if default is None]
        return Arguments(names, by_keyword, needed, given.vararg is not None, given.kwarg is not None)


@functools.cache
def _parsed(file: Path, name: str, is_package: bool) -> Module:
    """What takes the time, and is the same in all packages that a file belongs to."""
    return Module(name, is_package, ast.parse(file.read_text(encoding="utf-8")))


def absolute(source: Module, node: ast.ImportFrom) -> str:
    """The module that an import statement of `source` names."""
    if not node.level:
        return node.module or ""
    parts = source.name.split(".")
    kept = parts[: len(parts) - node.level + source.is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class, also those under if, try and with."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler | ast.For):
            yield from _statements(node)


def _bound(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


@functools.cache
def _members(kind: ast.ClassDef) -> dict[str, ast.AST]:
    """What instances have: names of the class body, and what its methods put on self."""
    found: dict[str, ast.AST] = {}
    for node in ast.walk(kind):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                        found.setdefault(part.attr, node)
    for node in _statements(kind):
        found |= dict.fromkeys(_bound(node), node)
    return found


def _makes_fields(kind: ast.AST | None) -> bool:
    assert isinstance(kind, ast.ClassDef)
    decorators = {_last_name(item) for item in kind.decorator_list}
    return bool(decorators & {"dataclass", "config"}) or bool({_last_name(base) for base in kind.bases} & FIELDS)


def _fields(kind: ast.AST | None) -> list[str]:
    assert isinstance(kind, ast.ClassDef)
    return [
        node.target.id for node in kind.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _last_name(node: ast.AST) -> str:
    """`Module` of torch.nn.Module, `config` of @config(...), `List` of List[int]."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.rpartition(".")[2]
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
