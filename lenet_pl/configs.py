"""Settings as text: config files and flags before jsonargparse reads them, and settings before they are saved."""

import difflib
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lenet_pl.errors import UsageError
from lenet_pl.runs import CONFIG

_HERE = Path(__file__).parent
# A wheel holds the checkout's folder configs as lenet_pl/recipes.
RECIPES = _HERE / "recipes" if (_HERE / "recipes").is_dir() else _HERE.parent / "configs"
_EXPECTED = "expected settings such as\nmodel:\n  lr: 0.001"


def read_in(args: list[str]) -> tuple[list[str], str | None]:
    """Replaces the names of config files in the arguments by the contents of the files.

    jsonargparse would read them in the locale's encoding, and would not name the file and the line of a mistake.

    Args:
        args: Command line arguments. ``--config`` or ``-c`` precedes the name of a config file, with ``=`` or a space.

    Returns:
        The arguments, and the name of the last file without its suffix, or None without a file.

    Raises:
        UsageError: See :func:`read`.
    """
    replaced, recipe, follows = [], None, False
    for arg in args:
        flag, equals, name = arg.partition("=")
        if follows:
            name = arg
        elif not (equals and flag in ("-c", "--config")):
            follows = arg in ("-c", "--config")
            replaced.append(arg)
            continue
        recipe = Path(name).stem
        replaced.append(read(name) if follows else f"{flag}={read(name)}")
        follows = False
    return replaced, recipe


def read(name: str) -> str:
    """Checks that a config file holds settings, and returns it as YAML in ASCII, which every locale can handle.

    Args:
        name: A file, or a recipe's name such as ``best`` or ``best.yaml``.

    Raises:
        UsageError: If the file does not exist, is not YAML in UTF-8, has a key twice, or holds no settings.
    """
    path = _find(name)
    try:
        text = path.read_text("utf-8")
        tree = yaml.compose(text, yaml.SafeLoader)
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"config file {name}{line}: {problem or 'this is not YAML'}; {_EXPECTED}") from error
    except (OSError, ValueError) as error:  # a folder, bytes that are not UTF-8, a date that does not exist
        raise UsageError(f"config file {name}: {error}; expected YAML in UTF-8") from error
    if not isinstance(tree, yaml.MappingNode):
        raise UsageError(f"config file {name}: {_EXPECTED}")
    _refuse_doubles(name, tree)
    for key, value in tree.value:
        if key.value in ("trainer", "model", "data") and not isinstance(value, yaml.MappingNode):
            raise UsageError(f"{_place(name, key)} has no settings; {_EXPECTED}")
    return str(yaml.serialize(tree, Dumper=yaml.SafeDumper, allow_unicode=False))


def _refuse_doubles(name: str, tree: yaml.MappingNode) -> None:
    """Refuses a key that is given twice, of which YAML would ignore the first one without a word."""
    seen = set()
    for key, value in tree.value:
        if key.value in seen:
            raise UsageError(f"{_place(name, key)} is there for the second time; join the two")
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            _refuse_doubles(name, value)


def _place(name: str, key: yaml.Node) -> str:
    return f"config file {name}, line {key.start_mark.line + 1}: {key.value}"


def _find(name: str) -> Path:
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises for an unknown user)
    if path.exists():
        return path
    recipe = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and recipe.is_file():
        return recipe
    recipes = sorted(found.stem for found in RECIPES.glob("*.yaml"))
    known = {recipe: recipe for recipe in recipes} | {f"{recipe}.yaml": f"{recipe}.yaml" for recipe in recipes}
    known |= {found.name: str(found) for found in path.parent.glob("*.yaml")}
    alike = difflib.get_close_matches(path.name, known, 1)
    hint = f"expected a file or one of the recipes {', '.join(recipes)}"
    if alike:
        hint = f"did you mean {known[alike[0]]}?"
    raise UsageError(f"config file {name} does not exist; {hint}")


def take_values(args: list[str], option: str) -> tuple[list[str], list[str]]:
    """Takes the values of an option out of the arguments: YAML would read a file name such as ``[a].png`` as a list.

    Returns:
        The other arguments, and the values, which are all words after the option up to the next option.
    """
    rest, values, taking = [], [], False
    for arg in args:
        if arg == option or arg.startswith(f"{option}="):
            taking = True
            values += [arg.partition("=")[2]] if "=" in arg[: len(option) + 1] else []
        elif taking and not arg.startswith("--"):
            values.append(arg)
        else:
            taking = False
            rest.append(arg)
    return rest, values


def with_home_folders(settings: Any) -> Any:
    """Expands ``~`` at the beginning of any text, because only paths begin with it."""
    return _changed(settings, os.path.expanduser)


def plain(settings: Any) -> Any:
    """Replaces members of enumerations, which are defaults in some signatures, by their text: YAML cannot hold them."""
    return _changed(settings, lambda text: str(text.value) if isinstance(text, Enum) else text)


def _changed(settings: Any, change: Callable[[str], str]) -> Any:
    """Applies ``change`` to every text in settings."""
    if isinstance(settings, Namespace):
        return Namespace(**{key: _changed(value, change) for key, value in vars(settings).items()})
    if isinstance(settings, list):
        return [_changed(value, change) for value in settings]
    return change(settings) if isinstance(settings, str) else settings


def joined(stored: Any, given: Any) -> Any:
    """Joins stored callbacks (loggers, plugins) with given ones. A given one replaces a stored one of its class."""
    if not isinstance(given, list):
        return given
    result = list(stored) if isinstance(stored, list) else []
    places = {id(entry): place for place, entry in enumerate(result)}
    for entry in given:
        match = next((old for old in result if id(old) in places and old.class_path == entry.class_path), None)
        if match is None:
            result.append(entry)
        else:
            result[places.pop(id(match))] = entry
    return result


def readable(settings: Any) -> Any:
    """Leaves out values that jsonargparse could not write. They are defaults of a signature, such as a device."""
    if isinstance(settings, list):
        return [readable(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    kept = {}
    for key, value in settings.items():
        if not str(value).startswith("Unable to serialize instance"):
            kept[key] = readable(value)
    return kept


def of_run(folder: Path) -> dict[str, Any]:
    """Returns the settings in the config.yaml of a run folder."""
    settings = dict(yaml.safe_load(read(str(folder / CONFIG))))
    settings.pop("ckpt_path", None)
    return settings
