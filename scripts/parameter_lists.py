"""An extension of griffe, which reads the docstrings for the site. It shows lines `name: what it is` as a list."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ParameterLists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = with_lists(obj.docstring.value)


def with_lists(docstring: str) -> str:
    """Make a list of each run of lines `name: text`, whose further lines are indented."""
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        entry = re.fullmatch(r"(\w+): (.+)", line)
        if entry:
            if not in_list:
                lines.append("")
            line = f"- `{entry[1]}`: {entry[2]}"
        in_list = bool(entry) or (in_list and line.startswith(" "))
        lines.append(line)
    return "\n".join(lines)
