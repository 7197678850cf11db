"""Prompt templates: text with the names of fields in braces."""

from __future__ import annotations

import string
from collections.abc import Mapping

from qerl_rl.config.errors import ConfigError

KEY = "data.prompt_template"


class PromptTemplate:
    """`Question: {question}` and the like; {{ and }} stand for braces.

    Only plain names: no attributes, indices, conversions or format specifications, so a launch file can't reach into
    objects and every name is the name of a field.

    Raises: ConfigError when the text is no such template.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{KEY} is no template: {error}.", fix="close every {name}, and write {{ and }} for braces"
            ) from None
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        for _, name, specification, conversion in parts:
            if name is not None and (specification or conversion or not name.isidentifier()):
                shown = name + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
                raise ConfigError(
                    f"{{{shown}}} in {KEY} is not the plain name of a field.",
                    fix="write {name} with the name of a field, and {{ and }} for braces",
                )
        self.fields = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        """Names in the template, in their order."""
        if not self.fields:
            raise ConfigError(
                f"{KEY} names no field: every prompt would be the same.",
                fix=f"put {{name}} with the name of a field into it, or leave {KEY} empty",
            )

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with `values` in place of the names; what is in a value stays as it is, braces too."""
        return "".join(literal + (values[name] if name is not None else "") for literal, name in self._parts)
