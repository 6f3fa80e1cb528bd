"""Small YAML and JSON files that anybody may have written: read within limits, and refused by name."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

MOST_BYTES = 2**16
"""A YAML file that is longer than this is refused: more would take seconds to read."""

MOST_JSON_BYTES = 2**26
"""A JSON file that is longer than this is refused: it would fill the memory."""

MOST_VALUES = 100_000
"""A YAML file that stands for more values than this is refused: a few lines of aliases can stand for billions."""

MOST_BITS = 64
"""A whole number of more bits is refused: none of ours is as large, and it can overflow whatever reckons with it."""


Takes = Mapping[str, tuple[Callable[[Any], bool], str]]
"""For names of values what each takes: whether a value is sound, and how an error says it."""


class DocumentError(ValueError):
    """A file that is not whole, or not of its kind; the message names it and what is wrong."""


# --- plain values ---------------------------------------------------------------------------------------------------


def fault(values: Mapping[str, Any], takes: Takes, needed: Iterable[str] = ()) -> str | None:
    """Return what is wrong with named values, as in "has no size" or "has size = 3, which takes a name"; or None.

    A name that is not `needed` may be missing, and one that `takes` does not know may have any value.
    """
    for name in needed:
        if name not in values:
            return f"has no {name}"
    for name, (is_sound, what) in takes.items():
        if name in values and not is_sound(values[name]):
            return f"has {name} = {short(values[name])}, which takes {what}"
    return None


def short(value: Any) -> str:
    """Return a value as an error shows it, in at most 80 characters."""
    try:
        text = " ".join(repr(value).split())  # that of a tensor has lines
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"{type(value).__name__} of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can encode: without lone surrogates, in which Python keeps other bytes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is a finite number from `least` to `most`, whole ones of `MOST_BITS`; True and False are none."""
    whole = type(value) is int and value.bit_length() <= MOST_BITS
    return (whole or (type(value) is float and math.isfinite(value))) and least <= value <= most


def is_whole(value: Any, least: int = 0, most: float = math.inf) -> bool:
    """Whether a value is a whole number from `least` to `most`, of `MOST_BITS`; True and False are none."""
    return type(value) is int and is_number(value, least, most)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_whole(value, least=1)


def are_numbers(value: Any) -> bool:
    """Whether a value is a list of finite numbers."""
    return isinstance(value, list) and all(map(is_number, value))


def is_share(value: Any) -> bool:
    """Whether a value is a share from 0 to 1, or None for one that is not known; rounding may lead beyond."""
    return value is None or is_number(value, -1e-6, 1 + 1e-6)


def is_seconds(value: Any) -> bool:
    """Whether a value is a time in seconds, of thirty years at most."""
    return is_number(value, 0, 1e9)


# --- files ----------------------------------------------------------------------------------------------------------


def open_plain(path: str | Path) -> BinaryIO:
    """Open a file to be read. Raises `OSError` for what is none, such as a pipe or a device, without waiting for it.

    In a folder that was sent there may be a link to /dev/zero, which has no end.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no plain file")
    return file


def _whole(digits: str, read: Callable[[], int]) -> int:
    """Return the whole number that `read` makes of its digits. Raises `ValueError` for more than `MOST_BITS`."""
    if len(digits) > 100 or (value := read()).bit_length() > MOST_BITS:  # reading very many digits takes long
        raise ValueError(f"the whole number {digits[:20]}… has more than {MOST_BITS} bits")
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, with whole numbers of at most `MOST_BITS`."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number. Raises `ValueError` with its line for one that is too large, or none."""
        try:
            return _whole(node.value, lambda: super(_Loader, self).construct_yaml_int(node))
        except ValueError as error:
            raise ValueError(f"line {node.start_mark.line + 1}: {error}") from error


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds: plain values, nothing that its tags ask for is made.

    Raises `DocumentError` for what is not YAML, for a key that is given twice in a mapping, of which YAML would take
    the last, and for files and aliases that stand for more than a file should hold.
    """
    path = Path(path)
    data = _read(path, MOST_BYTES, "Make several files of it.")
    try:
        loader = _Loader(data.decode("utf-8"))
        if (root := loader.get_single_node()) is None:
            return None
        _count(root, path, {})
        return loader.construct_document(root)
    except DocumentError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DocumentError(f"{path} is not YAML: {error}") from error
    except Exception as error:  # for a value that its tag does not fit, PyYAML raises whatever Python does
        raise DocumentError(f"{path} is not YAML: it holds an impossible value ({error}).") from error


def read_json(path: str | Path, kind: type = dict, takes: Takes | None = None, needed: Iterable[str] = ()) -> Any:
    """Return the `kind` of value, dict or list, that a JSON file holds.

    Raises `DocumentError` as `parse_json`, and for a dict in which there is a `fault`.
    """
    found = parse_json(_read(Path(path), MOST_JSON_BYTES, "Restore or delete it."), str(path), kind)
    if wrong := fault(found, takes or {}, needed):
        raise DocumentError(f"{path} {wrong}. Restore or delete it.")
    return found


def parse_json(text: str | bytes, source: str, kind: type = dict) -> Any:
    """Return the `kind` of value, dict or list, that a text in JSON holds; `source` is what an error calls it.

    Raises `DocumentError` for what is not JSON, holds NaN, an infinity, a whole number of more than `MOST_BITS` or text
    that UTF-8 cannot encode, and for another kind.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it holds {constant}")

    def finite(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits)

    def whole(digits: str) -> int:
        return _whole(digits, lambda: int(digits))

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite, parse_int=whole)
        json.dumps(value, ensure_ascii=False).encode()  # half a character, such as "\ud800", could not be written
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{source} is not JSON: {error}. Restore or delete it.") from error
    if not isinstance(value, kind):
        wanted = {dict: "names with values", list: "a list"}[kind]
        raise DocumentError(f"{source} holds {type(value).__name__} where {wanted} should be. Restore or delete it.")
    return value


def _read(path: Path, most: int, remedy: str) -> bytes:
    """Return what a file holds. Raises `DocumentError` for more than `most` bytes, with the remedy, without more."""
    try:
        with open_plain(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > most:
        raise DocumentError(f"{path} is longer than {most:,} bytes. {remedy}")
    return data


def _count(node: yaml.Node, path: Path, known: dict[int, int | None]) -> int:
    """Return how many values a node stands for, with those behind its aliases; `known` are the counts so far."""
    if id(node) in known:
        if (count := known[id(node)]) is None:
            raise DocumentError(f"{path}, line {node.start_mark.line + 1}: an alias stands for what it is part of.")
        return count
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # half a character, such as "\ud800", could not be written
    children: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise DocumentError(f"{path}, line {node.start_mark.line + 1}: {twice[0]!r} is given twice.")
        children = [child for pair in node.value for child in pair]
    known[id(node)] = count = 1 + sum(_count(child, path, known) for child in children)
    if count > MOST_VALUES:
        raise DocumentError(f"{path} stands for more than {MOST_VALUES:,} values: too many aliases.")
    return count
