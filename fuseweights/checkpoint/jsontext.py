"""Edits of a JSON text that leave every other character as it is: order, indent, escapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.decoder import JSONDecoder, scanstring
from typing import Any

Path = Sequence[str | int]
_SPACE = " \t\r\n"


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _members(text: str, at: int) -> list[tuple[str | int, int, int]]:
    """(key or index, begin, end of the value) of the object or list that starts at `at`."""
    is_object, closing = text[at] == "{", {"{": "}", "[": "]"}[text[at]]
    found: list[tuple[str | int, int, int]] = []
    at = _skip(text, at + 1)
    while text[at] != closing:
        key: str | int = len(found)
        if is_object:
            key, at = scanstring(text, at + 1, True)
            at = _skip(text, _skip(text, at) + 1)
        _, end = JSONDecoder().raw_decode(text, at)
        found.append((key, at, end))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def locate(text: str, path: Path) -> tuple[int, int]:
    """Begin and end of the value at `path`. Raises KeyError when there is none."""
    begin = _skip(text, 0)
    _, end = JSONDecoder().raw_decode(text, begin)
    for step in path:
        if text[begin] not in "{[":
            raise KeyError(step)
        for key, start, stop in _members(text, begin):
            if key == step:
                begin, end = start, stop
                break
        else:
            raise KeyError(step)
    return begin, end


def replaced(text: str, path: Path, value: Any) -> str:
    """`text` with another value at `path`."""
    begin, end = locate(text, path)
    return text[:begin] + json.dumps(value) + text[end:]


def removed(text: str, key: str) -> str:
    """`text` without a member of its outermost object, its comma and the space before it."""
    begin = _skip(text, 0)
    members = _members(text, begin)
    number = next((i for i, (name, _, _) in enumerate(members) if name == key), None)
    if number is None:
        raise KeyError(key)
    if number:
        return text[: members[number - 1][2]] + text[members[number][2] :]
    start = _skip(text, begin + 1)
    after = members[1][1] if len(members) > 1 else members[0][2]
    if len(members) > 1:  # back from the next value to its key
        after = _skip(text, _skip(text, members[0][2]) + 1)
    return text[:start] + text[after:]


def added(text: str, path: Path, values: Sequence[Any], keys: Sequence[str] | None = None) -> str:
    """`text` with `values` appended to the list at `path`, or under `keys` to the object there,
    separated and indented like its other members."""
    written = [json.dumps(value) for value in values]
    if keys is not None:
        written = [f"{json.dumps(k)}: {w}" for k, w in zip(keys, written, strict=True)]
    if not written:
        return text
    begin, end = locate(text, path)
    members = _members(text, begin)
    if not members:
        return f"{text[: begin + 1]}{', '.join(written)}{text[end - 1 :]}"
    last = members[-1][2]
    gap = text[begin + 1 : _skip(text, begin + 1)]  # what stands before the first member
    if not gap:
        between = text[members[0][2] : members[1][1]] if len(members) > 1 else ", "
        gap = " " if ", " in between else ""
    return text[:last] + "".join(f",{gap}{item}" for item in written) + text[last:]
