"""Reads a launch file and command-line overrides into a `Config`, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.locations import scalar_lines
from qerl_rl.config.mindspeed import Translation, is_mindspeed, is_theirs, translate
from qerl_rl.config.schema import Config


class KeyLocations:
    """Says where a key was set: `file.yaml:12`, `command line`, or the file alone for a default."""

    def __init__(self, path: Path, overrides: Sequence[str]) -> None:
        self._path = path
        self._lines: dict[str, str] = {}
        self._texts: dict[str, str] = {}
        self._overridden = {key: text for key, _, text in (override.partition("=") for override in overrides)}
        self._origins: Mapping[str, str] = {}
        self.add(path)

    def add(self, path: Path) -> None:
        """Read another file; what was read before counts."""
        for names, line, text in scalar_lines(path.read_text(encoding="utf-8")):
            name = ".".join(names)
            if name in self._lines:
                continue
            self._lines[name] = f"{path}:{line}"
            if text is not None:
                self._texts[name] = text

    def translated(self, origins: Mapping[str, str]) -> None:
        """From now on, say of each key where the key of another program's launch file stands that it comes from."""
        self._origins, self._lines, self._texts = origins, {}, {}

    def __call__(self, key: str) -> str:
        if key in self._overridden:
            return "command line"
        if key in self._origins:
            return self._origins[key]
        return self._lines.get(key, str(self._path))

    def as_written(self, key: str) -> str | None:
        """The characters that a key was set to, without quotes; None where that is no plain value."""
        return self._overridden.get(key, self._texts.get(key))


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its keys was set."""

    config: Config
    locate: KeyLocations
    translation: Translation | None = None
    """What became of a launch file of MindSpeed-RL; None for one of ours."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the YAML file at `path`, put `key=value` overrides on top, and check every key and type.

    A file may stand on others (`defaults: [{envs: ascend_a3}]`, for envs/ascend_a3.yaml beside it). A launch file of
    MindSpeed-RL is translated first; overrides may then be keys of theirs, too.

    Raises: ConfigError for a missing or unreadable file, an unknown key (with the nearest known one) or a value of the
    wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"there is no launch file {path}.", fix="give --config an existing YAML file, such as one in configs/"
        )
    try:
        locate = KeyLocations(path, overrides)
        from_file = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not readable YAML: {_one_line(error)}.", fix="correct the YAML", where=str(path)
        ) from None
    if not isinstance(from_file, DictConfig):
        raise ConfigError(
            f"{path} holds no sections.", fix="write sections such as `model:` with keys below them", where=str(path)
        )
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"'{override}' is not an override.", fix="write section.key=value", where="command line")
    translation = None
    if is_mindspeed(from_file):
        translation = translate(path, from_file, overrides)
        locate.translated(translation.origins)
        from_file = OmegaConf.create(translation.values)
        overrides = [override for override in overrides if not is_theirs(override)]
    elif "defaults" in from_file:
        from_file = _on_top_of_defaults(path, from_file, locate)
    from_line = _from_command_line(overrides)
    try:
        values = OmegaConf.to_container(OmegaConf.unsafe_merge(from_file, from_line), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_one_line(error)}.", fix="correct the interpolation", where=str(path)) from None
    config = _build(Config, cast("dict[str, Any]", values), "", locate)
    return LoadedConfig(config, locate, translation)


def _on_top_of_defaults(path: Path, own: DictConfig, locate: KeyLocations) -> DictConfig:
    """The sections of the files that `defaults: [{FOLDER: NAME}]` names, FOLDER/NAME.yaml beside the launch file, with
    the file's own on top."""
    merged = OmegaConf.create()
    for entry in own.pop("defaults") or []:
        if not isinstance(entry, DictConfig) or not all(isinstance(name, str) for name in entry.values()):
            problem, fix = f"defaults holds {entry!r}.", "write `- FOLDER: NAME`, for FOLDER/NAME.yaml beside this file"
            raise ConfigError(problem, fix=fix, where=locate("defaults"))
        for folder, name in entry.items():
            file = path.parent / str(folder) / f"{name}.yaml"
            if not file.is_file():
                near = difflib.get_close_matches(name, [other.stem for other in file.parent.glob("*.yaml")], n=1)
                fix = f"write {near[0]}" if near else f"put {name}.yaml into {file.parent}"
                raise ConfigError(f"there is no file {file}.", fix=fix, where=locate("defaults"))
            try:
                merged.merge_with(OmegaConf.load(file))
                locate.add(file)
            except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
                problem = f"{file} is not readable YAML: {_one_line(error)}."
                raise ConfigError(problem, fix="correct the YAML", where=str(file)) from None
    merged.merge_with(own)
    return merged


def _from_command_line(overrides: Sequence[str]) -> DictConfig:
    merged = OmegaConf.create()
    for override in overrides:
        try:
            merged.merge_with_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            key = override.partition("=")[0]
            raise ConfigError(
                f"the value of {key} is not readable YAML: {_one_line(error)}.",
                fix=f"put quotes around text with braces or colons: \"{key}='...'\"",
                where="command line",
            ) from None
    return merged


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every key with its value."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_dict(values: dict[str, Any]) -> Config:
    """The `Config` whose `dataclasses.asdict` is `values` (how a configuration travels to other processes)."""
    return cast("Config", _from_dict(Config, values))


def _from_dict(kind: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    return kind(
        **{
            name: _from_dict(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


def _section_type(name: str) -> Any:
    return get_type_hints(Config)[name]


def _build(kind: Any, values: dict[str, Any], prefix: str, locate: KeyLocations) -> Any:
    """An instance of the dataclass `kind` from a plain dictionary, key by key."""
    hints = get_type_hints(kind)
    known: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise _unknown_key(name, str(key), prefix, list(hints), locate)
        if value is None and getattr(kind, key, None) == "none":
            # As other programs write that word: verl's rollout_is: null.
            value = "none"
        known[key] = _value(hints[key], value, name, locate)
    return kind(**known)


def _value(hint: Any, value: Any, name: str, locate: KeyLocations) -> Any:
    if dataclasses.is_dataclass(hint):
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"{name}={value!r} is no section.", fix=f"write keys below {name}:", where=locate(name))
        return _build(hint, value, f"{name}.", locate)
    if hint is str and value is None:
        return ""
    if hint is str and type(value) in (int, float):
        # YAML drops underscores from numbers: the band 0.5_5 would arrive as 0.55.
        text = locate.as_written(name)
        return str(value) if text is None or "${" in text else text
    if hint in (dict[str, str], dict[str, float]):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{name}={value!r} is not a mapping.", fix=f"write KEY: value lines below {name}:", where=locate(name)
            )
        if hint == dict[str, str]:
            return {str(key): str(item) for key, item in value.items()}
        return {str(key): _value(float, item, f"{name}.{key}", locate) for key, item in value.items()}
    if hint in (list[int], list[str]):
        [kind] = get_args(hint)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            items, example = {int: ("whole numbers", "[1, 2, 4]"), str: ("names", "[one, another]")}[kind]
            problem, fix = f"{name}={value!r} is no list of {items}.", f"write {name} as {example}"
            raise ConfigError(problem, fix=fix, where=locate(name))
        return value
    if hint is float and type(value) is int:
        return float(value)
    # OmegaConf's own nodes convert and check plain values ("1e-3" is a float, "yes" is no bool).
    try:
        holder = OmegaConf.structured(_holder(hint))
        holder.value = value
        return holder.value
    except OmegaConfBaseException:
        kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}[hint.__name__]
        raise ConfigError(f"{name}={value!r} is not {kind}.", fix=f"set {name} to {kind}", where=locate(name)) from None


@functools.cache
def _holder(hint: Any) -> type:
    """A dataclass with one value of that type (making one takes a hundred times as long as using it)."""
    return dataclasses.make_dataclass("Holder", [("value", hint)])


def _unknown_key(name: str, key: str, prefix: str, known: list[str], locate: KeyLocations) -> ConfigError:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    sections = [section.name for section in dataclasses.fields(Config)]
    elsewhere = [f"{section}.{key}" for section in sections if key in get_type_hints(_section_type(section))]
    if nearest:
        fix = f"write {prefix}{nearest[0]}"
    elif elsewhere:
        fix = f"write {' or '.join(elsewhere)}"
    else:
        fix = f"use one of {', '.join(prefix + item for item in known)}"
    return ConfigError(f"unknown key {name}.", fix=fix, where=locate(name))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
