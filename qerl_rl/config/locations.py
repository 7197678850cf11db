"""Where the keys of a YAML file stand."""

from __future__ import annotations

from collections.abc import Iterator

import yaml


def scalar_lines(text: str) -> Iterator[tuple[tuple[str, ...], int, str | None]]:
    """Of every key of the YAML `text`: its path, its line (from 1) and its value as written, None of no plain value.

    Raises: yaml.YAMLError.
    """
    root = yaml.compose(text)
    if root is not None:
        yield from _walk(root, ())


def _walk(node: yaml.Node, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int, str | None]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = (*above, str(key.value))
        yield path, key.start_mark.line + 1, value.value if isinstance(value, yaml.ScalarNode) else None
        yield from _walk(value, path)
