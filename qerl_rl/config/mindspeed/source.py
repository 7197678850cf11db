"""A MindSpeed-RL launch file with its model files and overrides on top, and the lines that its keys stand on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.locations import scalar_lines
from qerl_rl.config.mindspeed.tables import DERIVED, PROFILER, ROLES, SAMPLING, SECTIONS, TRAINING, known_keys

_MODEL = "model"
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
}


class Source:
    """What the files say. Keys are named `section.key`, with `_` for `-`; those of the model files `model.NAME.key`.

    Args: path: the launch file. tree: as OmegaConf read it. overrides: `section.key=value` for its sections.
    Raises: ConfigError for a model file that is missing or unreadable, and for an unknown section or key.
    """

    def __init__(self, path: Path, tree: DictConfig, overrides: Sequence[str]) -> None:
        self.path = path
        self._lines: dict[str, str] = {}
        models = [self._load_model(name) for name in self._models(tree)]
        self._note_lines(path)
        own = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "defaults"])
        try:
            merged = OmegaConf.unsafe_merge({_MODEL: OmegaConf.unsafe_merge(*models)} if models else {}, own)
            for override in overrides:
                # One by one, so that an error names its key.
                merged.merge_with_dotlist([override])
                self._lines[_dashes(override.partition("=")[0])] = "command line"
            sections = OmegaConf.to_container(merged, resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"{problem}.", fix="correct the value or interpolation", where=str(path)) from None
        self._sections: dict[str, Any] = {}
        for name, values in sections.items():  # type: ignore[union-attr]
            self._add_section(str(name), values)

    def get(self, section: str, key: str, default: Any = None) -> Any:
        """The value of a key, `default` where none is written; of a role also from what it builds on."""
        name = self.name_of(section, key)
        if name is None:
            return default
        place, _, _ = name.rpartition(".")
        return self._sections[place][key]

    def typed(self, section: str, key: str, kind: type, default: Any = None) -> Any:
        """`get` of a key to compute with. Raises: ConfigError where it is neither of `kind` nor left out (null)."""
        value = self.get(section, key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            name = self.name_of(section, key) or key
            raise ConfigError(
                f"{name}={value!r} is not {_KINDS[kind]}.", fix=f"set {name} to {_KINDS[kind]}", where=self.where(name)
            )
        return value

    def has(self, section: str) -> bool:
        """Whether the file has this section."""
        return section in self._sections

    def name_of(self, section: str, key: str) -> str | None:
        """`section.key` of where the value comes from, None where the key is not written."""
        for place in self._chain(section):
            if key in self._sections.get(place, {}):
                return f"{place}.{key}"
        return None

    def where(self, name: str) -> str:
        """`file:line` of a key of theirs, `command line`, or the launch file's path alone."""
        return self._lines.get(name, str(self.path))

    def located(self, section: str, key: str) -> str:
        """Where a value comes from and under which name, such as `configs/x.yaml:12, actor_config.lr`."""
        name = self.name_of(section, key)
        return f"{self.where(name)}, {name}" if name else f"{self.path}, {section}.{key} by default"

    def written(self) -> list[tuple[str, str]]:
        """(section, key) of all that is written and counts, in the files' order; of roles that nothing reads, none."""
        read = [
            TRAINING,
            *(place for section in ROLES for place in self._chain(section)),
            *SECTIONS,
            SAMPLING,
            PROFILER,
        ]
        return [
            (place, key) for place in dict.fromkeys(read) if place in self._sections for key in self._sections[place]
        ]

    # ---- reading

    def _chain(self, section: str) -> list[str]:
        """A role's own section, then megatron_training, then the model file that it names."""
        if section not in ROLES:
            return [section]
        own = list(dict.fromkeys((section, TRAINING)))
        name = next((model for place in own if (model := self._sections.get(place, {}).get("model"))), None)
        return [*own, f"{_MODEL}.{name}"]

    def _models(self, tree: DictConfig) -> list[str]:
        """The names below `defaults: [{model: ...}]`."""
        names: list[str] = []
        for entry in OmegaConf.to_container(OmegaConf.create({"all": tree.get("defaults") or []}))["all"]:  # type: ignore[index,call-overload]
            if entry == "_self_":
                continue
            group = entry.get(_MODEL) if isinstance(entry, dict) and list(entry) == [_MODEL] else None
            if group is None:
                problem = f"defaults holds {entry!r}, which is no model file."
                fix = "write `- model: [NAME]`, for model/NAME.yaml beside this file"
                raise ConfigError(problem, fix=fix, where=self.where("defaults"))
            names += [group] if isinstance(group, str) else [str(name) for name in group]
        return names

    def _load_model(self, name: str) -> Any:
        file = self.path.parent / _MODEL / f"{name}.yaml"
        if not file.is_file():
            neighbours = [other.stem for other in file.parent.glob("*.yaml")]
            near = difflib.get_close_matches(name, neighbours, n=1)
            fix = f"name {near[0]} instead" if near else f"put {name}.yaml into {file.parent}"
            raise ConfigError(f"there is no model file {file}.", fix=fix, where=str(self.path))
        try:
            self._note_lines(file, f"{_MODEL}.")
            return OmegaConf.load(file)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problem = f"{file} is not readable YAML: {' '.join(str(error).split())}."
            raise ConfigError(problem, fix="correct the YAML", where=str(file)) from None

    def _note_lines(self, file: Path, prefix: str = "") -> None:
        for path, line, _ in scalar_lines(file.read_text(encoding="utf-8")):
            self._lines[prefix + _dashes(".".join(path))] = f"{file}:{line}"

    def _add_section(self, name: str, values: Any) -> None:
        if name == _MODEL and isinstance(values, Mapping):
            for model, keys in values.items():
                self._add_keys(f"{_MODEL}.{model}", keys, TRAINING)
        elif name in SECTIONS:
            self._add_keys(name, values, name)
        else:
            near = difflib.get_close_matches(name, SECTIONS, n=1) or [f"one of {', '.join(SECTIONS)}"]
            where = self.where(name)
            raise ConfigError(f"unknown section {name}.", fix=f"write {near[0]}", where=where)

    def _add_keys(self, section: str, values: Any, kind: str) -> None:
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"{section} is no section.", fix="write keys below it", where=self.where(section))
        known, found = known_keys(kind), {}
        for key, value in ((_dashes(str(key)), value) for key, value in values.items()):
            name = f"{section}.{key}"
            if name in DERIVED:
                self._add_keys(name, value, name)
            if key not in known:
                raise self._unknown(name, section, key, known)
            found[key] = value
        self._sections[section] = found

    def _unknown(self, name: str, section: str, key: str, known: set[str]) -> ConfigError:
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
        elsewhere = [place for place in (TRAINING, *SECTIONS[6:], SAMPLING) if key in known_keys(place)]
        if near:
            fix = f"write {section}.{near[0]}"
        else:
            fix = f"write it in {elsewhere[0]}" if elsewhere else "leave it out: MindSpeed-RL knows no such key"
        return ConfigError(f"unknown key {name}.", fix=fix, where=self.where(name))


def _dashes(name: str) -> str:
    return name.replace("-", "_")
