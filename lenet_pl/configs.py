"""Reads config files and stored settings, and corrects what jsonargparse would read in an unexpected way."""

import difflib
import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]

from lenet_pl.errors import UsageError
from lenet_pl.runs import CONFIG

_HERE = Path(__file__).parent
# A wheel holds the checkout's folder configs as lenet_pl/recipes.
RECIPES = _HERE / "recipes" if (_HERE / "recipes").is_dir() else _HERE.parent / "configs"
_EXPECTED = "expected settings such as\nmodel:\n  lr: 0.001"


class ConfigFile(ActionConfigFile):
    """The option ``--config``. It hands the content of the file to jsonargparse.

    jsonargparse would read the file in the locale's encoding, and would not name the line of a mistake.
    """

    def __call__(self, parser: Any, settings: Any, values: Any, option_string: str | None = None) -> None:
        """Adds the settings in a file; ``config`` in the settings lists the names of all files."""
        super().__call__(parser, settings, read(values), option_string)
        settings[self.dest][-1] = values  # jsonargparse stores None for a text


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is given twice, of which YAML would silently ignore the first one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: list[Any] = []  # no set, because a key may be a list
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} appears twice; merge the two", key.start_mark)
            seen.append(key.value)
        return node


def read(name: str) -> str:
    """Checks that a config file, or a recipe such as ``best``, holds settings; returns it as YAML in ASCII.

    Raises:
        UsageError: If the file does not exist, is not YAML in UTF-8, has a key twice, or holds no settings.
    """
    path = _find(name)
    try:
        text = path.read_text("utf-8")
        tree = yaml.compose(text, _Loader)
        yaml.safe_load(text)  # finds bad values, such as 30 February
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"config file {name}{line}: {problem or 'this is not YAML'}; {_EXPECTED}") from error
    except (OSError, ValueError) as error:  # a folder, bytes that are not UTF-8, a date that does not exist
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"config file {name!r}: {why}; expected YAML in UTF-8") from error
    if not isinstance(tree, yaml.MappingNode):
        raise UsageError(f"config file {name}: {_EXPECTED}")
    for key, value in tree.value:
        if key.value in ("trainer", "model", "data") and not isinstance(value, yaml.MappingNode):
            line = key.start_mark.line + 1
            raise UsageError(f"config file {name}, line {line}: {key.value} has no settings; {_EXPECTED}")
        if key.value == "name" and value.tag.endswith(":str"):
            value.style = '"'  # otherwise jsonargparse reads 1e-3 as a number
    return str(yaml.serialize(tree, Dumper=yaml.SafeDumper, allow_unicode=False))


def _find(name: str) -> Path:
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for an unknown user)
    recipes = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.yaml"))}
    # os.path raises no error for any name.
    if os.path.isfile(path) or (os.path.lexists(path) and name not in recipes):  # noqa: PTH113
        return path
    if name.removesuffix(".yaml") in recipes:
        return recipes[name.removesuffix(".yaml")]
    known = {recipe: recipe for recipe in recipes} | {file.stem: str(file) for file in path.parent.glob("*.yaml")}
    alike = difflib.get_close_matches(path.stem, known, 1)
    hint = f"expected a file or one of the recipes {', '.join(recipes)}"
    if alike:
        hint = f"did you mean {known[alike[0]]}?"
    raise UsageError(f"config file {name} does not exist; {hint}")


def with_home_folders(settings: Any) -> Any:
    """Expands ``~`` at the beginning of any text in settings, because only paths begin with it."""
    if isinstance(settings, Namespace):
        return Namespace(**{key: with_home_folders(value) for key, value in vars(settings).items()})
    if isinstance(settings, list):
        return [with_home_folders(value) for value in settings]
    return os.path.expanduser(settings) if isinstance(settings, str) else settings  # noqa: PTH111 (as above)


def joined(stored: list[Namespace], given: list[Namespace]) -> list[Namespace]:
    """Adds callbacks (loggers, plugins) to those of a run. They replace those that have their class and ``monitor``."""
    new = [_identity(piece) for piece in given]
    return [piece for piece in stored if _identity(piece) not in new] + given


def _identity(piece: Namespace) -> tuple[str, Any]:
    return piece.class_path, piece.get("init_args.monitor")


def of_run(folder: Path) -> dict[str, Any]:
    """Returns the settings in the config.yaml of a run folder."""
    settings = dict(yaml.safe_load(read(str(folder / CONFIG))))
    return settings | {"data": _with_data_here(settings.get("data", {}))}


def of_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that a checkpoint itself holds: model, data, seed and precision."""
    return {
        "model": dict(checkpoint["hyper_parameters"]),
        "data": _with_data_here(checkpoint["datamodule_hyper_parameters"]),
        "seed_everything": checkpoint["seed"] % 2**32,  # torch takes larger seeds than Lightning
        "trainer": {"precision": checkpoint.get("precision")},
    }


def _with_data_here(data: dict[str, Any]) -> dict[str, Any]:
    """Leaves out a ``data_dir`` that is not there: the settings come from another machine."""
    is_there = Path(data.get("data_dir", "")).is_dir()
    return {name: value for name, value in data.items() if name != "data_dir" or is_there}
