"""Build the documentation's site in build/site/ from the texts as they are in the project. `make docs` calls it.

The pages are those in zensical.toml. They are copied to build/site-source/ in the folders where they are here, with the
files that they link to, so that the same links work on the site and where the code is hosted. Two pages differ: the
front page puts README's example beside its picture, and docs/reference.md is made from the public names' docstrings.

It fails on a link that leads nowhere, a text that no page shows, and a public name or member without a docstring.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import tomllib

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "site-source"
FRONT_PAGE = "README.md"
REFERENCE = "docs/reference.md"  # made here

STYLE = """\
/* The front page: the example beside the picture where there is room, in letters small enough for its longest line. */
body:has(.first-screen) .md-grid { max-width: 72rem; }
.first-screen { display: grid; gap: 0 1.6rem; align-items: start; }
.first-screen > * { min-width: 0; }
.first-screen h2 { margin-top: 0.4rem; }
@media screen and (min-width: 60em) {
  .first-screen { grid-template-columns: 3fr 2fr; }
  .first-screen pre > code { font-size: 0.54rem; }
}
/* A name in a table breaks only if it is wider than its column can be. */
.md-typeset td code { word-break: normal; overflow-wrap: break-word; }
/* The pictures are drawn on white. */
.md-typeset img { background: white; border-radius: 0.2rem; }
"""


def pages() -> list[str]:
    """The pages that zensical.toml lists."""
    with open(ROOT / "zensical.toml", "rb") as file:
        nav = tomllib.load(file)["project"]["nav"]
    return list(_files_of(nav))


def _files_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _files_of(part)


def exists(page: str) -> bool:
    return page == REFERENCE or (ROOT / page).is_file()


def linked_files(page: str, text: str) -> Iterator[str]:
    """The files, other than texts, that a page links to or shows."""
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target) and not target.endswith(".md"):
            file = (ROOT / page).parent / target
            if file.is_file():
                yield file.resolve().relative_to(ROOT).as_posix()


def front_page(readme: str) -> str:
    """README with its example and its picture side by side, on a page as wide as the window."""
    sections = re.split(r"(?m)^(?=## )", readme)
    by_heading = {section.partition("\n")[0].removeprefix("## "): section for section in sections[1:]}
    left, right = by_heading.pop("Example"), by_heading.pop("How fast it is")
    beside = "".join(f'<div markdown="1">\n\n{section}\n</div>\n' for section in (left, right))
    first_screen = f'<div class="first-screen" markdown="1">\n{beside}</div>\n\n'
    return "---\nhide:\n  - navigation\n  - toc\n---\n\n" + sections[0] + first_screen + "".join(by_heading.values())


def public() -> list[griffe.Object | griffe.Alias]:
    """The public classes and functions, those that users meet first in front. Their files are read, not imported."""
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    package = loader.load("grpc_batcher")
    loader.resolve_aliases()
    found = [
        member
        for module in (package, package["ray"], package["prometheus"])
        for name, member in module.members.items()
        if name in (module.exports or ()) and not name.startswith("__")
    ]
    first = ["create_batcher", "MukoeBatcher", "MukoeBatcherClient"]
    return sorted(found, key=lambda each: first.index(each.name) if each.name in first else len(first))


def reference(names: list[griffe.Object | griffe.Alias]) -> str:
    """The page of the public names, of which mkdocstrings shows the docstrings."""
    introduction = (
        "The public names with their signatures and docstrings. All are imported from `grpc_batcher`, apart from those "
        "of replicas (`grpc_batcher.ray`) and the collectors (`grpc_batcher.prometheus`). [API](api.md) has the same "
        "as tables."
    )
    return "\n\n".join(["# Reference", introduction, *(f"::: {each.path}" for each in names)])


def undocumented(names: list[griffe.Object | griffe.Alias]) -> list[str]:
    """The public names, and their methods and properties, without a docstring."""
    members = [
        member
        for each in names
        if each.is_class
        for name, member in each.members.items()
        if not name.startswith("_") and (member.is_function or "property" in member.labels)
    ]
    return [each.path for each in (*names, *members) if not each.docstring]


def main() -> None:
    shown = pages()
    names = public()
    shutil.rmtree(SOURCE, ignore_errors=True)
    problems = [f"{name} has no docstring" for name in undocumented(names)]
    problems += [f"{page} is in the nav of zensical.toml, but not here" for page in shown if not exists(page)]
    texts = {file.relative_to(ROOT).as_posix() for pattern in ("*.md", "docs/*.md") for file in ROOT.glob(pattern)}
    problems += [f"{text} is not in the nav of zensical.toml" for text in sorted(texts - set(shown))]
    if problems:
        sys.exit("\n".join(problems))
    for page in shown:
        text = reference(names) if page == REFERENCE else (ROOT / page).read_text()
        if page == FRONT_PAGE:
            text = front_page(text)
        for file in linked_files(page, text):
            (SOURCE / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, SOURCE / file)
        (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
        (SOURCE / page).write_text(text)
    (SOURCE / "site.css").write_text(STYLE)
    sys.exit(subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
