"""Every measured number of README.md and docs/ must stand in a result file that its section links to.

A section is what lies between two headings. Measured are numbers with a unit (x, %, dB, s, ms, min, MiB) and numbers with
decimals; versions are left out, and so is code. Sections that link to no results may hold no such number with a unit.

The numbers of a table's line must come from a single row of a result that is linked since the table before. Lines that a
program printed (a fence without a language) must stand in a result's notes, letter by letter. Names, notes and what a result
says of its machine back nothing; how many minutes it took does.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.record.recording import RESULTS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
_TOKEN = re.compile(r"(?<![\w./-])(\d+(?:,\d{3})*(?:\.\d+)?)(x\b|\s?(?:dB|%|s|ms|min|MiB)(?![\w]))?(?![\w/-]|\.\d)")
_LINK = re.compile(r"bench/results/([\w.]+?)\.(?:md|json|jsonl|png)")
_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
# What results write for a value and its spread: "1.66 (1.61 to 1.71)", "0.61 to 1.94", "> 5.60".
_VALUE = re.compile(rf"[<>]?\s*{_NUMBER}(?: to {_NUMBER}| \({_NUMBER} to {_NUMBER}\))?")


class Claim(NamedTuple):
    """A number that a page states: how it is written, its unit or "", its line."""

    text: str
    unit: str
    line: int


class _Line(NamedTuple):
    number: int
    text: str
    is_printed: bool

    @property
    def is_of_table(self) -> bool:
        return self.text.startswith("|") and not self.is_printed


class _Result(NamedTuple):
    """The numbers of every row, and the notes."""

    rows: list[list[float]]
    notes: list[str]


def check() -> None:
    """Print every number without backing, and exit with 1 if there is one."""
    unbacked = [(page, claim) for page in PAGES for claim in find_unbacked(page.read_text(), RESULTS)]
    for page, claim in unbacked:
        where = f"{page.relative_to(ROOT)}:{claim.line}"
        print(f"{where}: {claim.text}{claim.unit} stands in no result that its section links to")
    if unbacked:
        raise SystemExit(1)
    print(f"every measured number of {len(PAGES)} pages stands in bench/results")


def find_unbacked(text: str, folder: Path) -> Iterator[Claim]:
    """Claims of a page that no linked JSON holds, rounded as they are."""
    for section in _sections(text):
        known = _read(section, folder)
        is_linked = any(_LINK.search(line.text) for line in section)
        recent: list[_Line] = []
        for is_table, group in itertools.groupby(section, key=lambda line: line.is_of_table):
            lines = list(group)
            recent = recent + lines if is_table else lines
            if is_table:
                rows = [row for result in _read(recent, folder) for row in result.rows]
            else:
                rows = [[value for result in known for row in result.rows for value in row]]
            for line in lines:
                if line.is_printed and any(line.text in result.notes for result in known):
                    continue
                claims = [claim for claim in _claims(line) if claim.unit or (is_linked and "." in claim.text)]
                yield from claims if line.is_printed else _beyond(claims, rows)


def _beyond(claims: list[Claim], rows: list[list[float]]) -> list[Claim]:
    """Claims that the row which backs most of them leaves over."""
    left = ([claim for claim in claims if not _is_backed(claim, row)] for row in rows)
    return min(left, key=len, default=claims)


def _sections(text: str) -> Iterator[list[_Line]]:
    """Lines without code; fences without a language are what a program printed, and stay."""
    section: list[_Line] = []
    fence: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
            continue
        if fence:
            continue
        if fence is None and line.startswith("#"):
            yield section
            section = []
        section.append(_Line(number, line, is_printed=fence is not None))
    yield section


def _claims(line: _Line) -> Iterator[Claim]:
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|(?:Python|torch|inductor) \d+\.\d+", " ", line.text)
    for match in _TOKEN.finditer(prose):
        yield Claim(match[1], match[2] or "", line.number)


def _read(lines: Sequence[_Line], folder: Path) -> list[_Result]:
    """The results that some lines link to; those that are not there back nothing."""
    names = sorted({name for line in lines for name in _LINK.findall(line.text)})
    paths = [path for name in names if (path := folder / f"{name}.json").exists()]
    results = []
    for stored in (json.loads(path.read_text()) for path in paths):
        rows = [list(_numbers(row)) for row in [*stored["rows"], stored.get("minutes")]]
        results.append(_Result(rows, stored.get("notes", [])))
    return results


def _numbers(entry: Any) -> Iterator[float]:
    """Numbers of a row; of its strings those that write a value, none of its keys."""
    if isinstance(entry, dict):
        entry = list(entry.values())
    if isinstance(entry, list):
        for value in entry:
            yield from _numbers(value)
    elif isinstance(entry, str) and _VALUE.fullmatch(entry):
        yield from (float(number) for number in re.findall(_NUMBER, entry))
    elif isinstance(entry, int | float) and not isinstance(entry, bool):
        yield float(entry)


def _is_backed(claim: Claim, values: Sequence[float]) -> bool:
    """Whether a value rounds to the claim; percentages may be kept as shares, milliseconds as seconds."""
    plain = claim.text.replace(",", "")
    half = 0.5001 * 10.0 ** -(len(plain.split(".")[1]) if "." in plain else 0)
    scales = {"%": (1.0, 100.0), "ms": (1.0, 1e3)}.get(claim.unit.strip(), (1.0,))
    return any(abs(abs(value) * scale - float(plain)) <= half for value in values for scale in scales)


if __name__ == "__main__":
    check()
