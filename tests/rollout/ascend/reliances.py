"""What the rollout engine's code relies on in vLLM and vllm-ascend, found in its own sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qerl_rl.rollout import vllm_objects, vllm_patches
from tests.rollout.ascend.packages import Found, Function, Packages

PACKAGES = ("vllm", "vllm_ascend")
CPU, NPU = vllm_objects.CPU, vllm_objects.NPU


@dataclass(frozen=True)
class Scope:
    """A top-level statement of a file: where names from vLLM come from, and which names are its objects."""

    file: str
    node: ast.stmt
    imports: Mapping[str, tuple[str, str]]
    objects: Mapping[str, str]

    @property
    def place(self) -> str:
        return f"{self.file}:{getattr(self.node, 'name', '')}"

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The engines whose code this is."""
        name = getattr(self.node, "name", "")
        patches = {kind: {patch.__name__ for patch in own} for kind, own in vllm_patches.PATCHES.items()}
        is_patch = self.file == "vllm_patches.py" and name in patches["cpu"] | {"_all_gatherv", "_reduce_scatterv"}
        if {self.file, self.place} & {*vllm_objects.ON_CPU} or (is_patch and name not in patches["910"]):
            return (CPU,)
        return (CPU, NPU)


def scopes(folder: Path, names: Mapping[str, Mapping[str, str]] = vllm_objects.NAMES) -> Iterator[Scope]:
    """The top-level functions and classes of all files under a folder."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        outside = _imports(node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import))
        file = path.relative_to(folder).as_posix()
        for node in tree.body:
            if isinstance(node, ast.ClassDef | Function):
                objects = {**names.get(file, {}), **names.get(f"{file}:{node.name}", {})}
                yield Scope(file, node, outside | _imports(ast.walk(node)), objects)


def _imports(nodes: Iterator[ast.AST]) -> dict[str, tuple[str, str]]:
    """Name -> (module, what is imported from it; empty for the module itself)."""
    found: dict[str, tuple[str, str]] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            found |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            named = [alias for alias in node.names if alias.name.partition(".")[0] in PACKAGES]
            found |= {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in named}
    return found


class Checker:
    """Looks up what a scope relies on, in the packages of one engine."""

    def __init__(self, packages: Packages, engine: str) -> None:
        self._packages, self._engine = packages, engine
        self.looked_up: set[str] = set()

    def faults(self, scope: Scope) -> Iterator[str]:
        """A line for each name that the packages do not have, and each call that does not bind."""
        for name, (module, original) in scope.imports.items():
            if self._packages.holds(module) and self._imported(scope, name) is None:
                yield f"{scope.place}: {module} has no {original}"
        inner: set[ast.AST] = set()
        for node in ast.walk(scope.node):
            if isinstance(node, ast.Attribute) and node not in inner:
                inner |= {part for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                fault = self._followed(scope, node)[1]
                if fault:
                    yield f"{scope.place}: {fault}"
            if isinstance(node, ast.Call):
                fault = self._call(scope, node)
                if fault:
                    yield f"{scope.place}: {fault}"

    def _imported(self, scope: Scope, name: str) -> Found | None:
        module, original = scope.imports[name]
        if original:
            return self._packages.find(module, original)
        source = self._packages.module(module.partition(".")[0])
        return None if source is None else Found(source, None)

    def _followed(self, scope: Scope, node: ast.expr) -> tuple[Found | None, str | None]:
        """What an expression such as engine.model_executor.driver_worker stands for, and what is wrong with it."""
        chain = _chain(node)
        size = next((n for n in range(len(chain), 0, -1) if ".".join(chain[:n]) in scope.objects), 0)
        kind = scope.objects.get(".".join(chain[:size]))
        if kind is not None and self._engine not in vllm_objects.KINDS[kind]:
            return None, None
        if kind is not None:
            found = self._of_kind(kind)
        elif chain and chain[0] in scope.imports and self._packages.holds(scope.imports[chain[0]][0]):
            found, size = self._imported(scope, chain[0]), 1
        else:
            return None, None
        for place in range(size, len(chain)):
            if found is None:
                return None, None
            owner, name = found, chain[place]
            if name.startswith("qerl_"):
                return None, None
            self.looked_up.add(f"{kind or '.'.join(chain[:place])}.{name}")
            found = self._packages.member(owner, name)
            if found is None:
                where = vllm_objects.KINDS[kind][self._engine] if kind else ".".join(chain[:place])
                return None, f"{where} has no {name} (in {ast.unparse(node)})"
            kind = vllm_objects.PARTS.get(f"{kind}.{name}") if kind else None
            if kind is not None:
                found = self._of_kind(kind)
            elif not isinstance(found.node, ast.ClassDef | Function | None):
                # What it holds is not said.
                return None, None
        return found, None

    def _of_kind(self, kind: str) -> Found:
        module, _, name = vllm_objects.KINDS[kind][self._engine].partition(":")
        found = self._packages.find(module, name)
        assert found is not None, f"{self._engine} has no {module}:{name}: correct qerl_rl/rollout/vllm_objects.py"
        return found

    def _call(self, scope: Scope, node: ast.Call) -> str | None:
        if (
            isinstance(node.func, ast.Name)
            and node.func.id in ("existing", "hasattr", "getattr")
            and len(node.args) > 1
        ):
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and node.func.id == "existing":
                return self._followed(scope, ast.Attribute(owner, name.value))[1]
            return None
        called, fault = self._followed(scope, node.func)
        if called is None or fault:
            return None
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return None
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        refusal = self._packages.refusal(called, len(node.args), keywords)
        hidden = any(keyword.arg is None for keyword in node.keywords)
        if refusal is None or (hidden and refusal.startswith("needs")):
            return None
        return f"{ast.unparse(node.func)} {refusal}"


def _chain(node: ast.expr) -> list[str]:
    """The names of a.b.c; none for what begins otherwise."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = _chain(node.value)
        return [*before, node.attr] if before else []
    return []


def named_variables(folder: Path, prefixes: tuple[str, ...]) -> dict[str, str]:
    """Environment variables that the code names: by name, the file."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
                if name.startswith(prefixes) and name.replace("_", "").isalnum() and name.isupper():
                    found[name] = path.relative_to(folder).as_posix()
    return found
