"""Every measured number of README.md must stand in a result file that its section links to.

A section is what lies between two headings. Measured are numbers with a unit (x, %, dB, s, ms, MiB) and numbers with
decimals; code, but not what a program printed, is left out, and so are versions. Sections that link to no results may hold no
such number with a unit. The numbers of a table's line must come from a few rows of results, not from anywhere in them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.recording import RESULTS

README = Path(__file__).parent.parent / "README.md"
_TOKEN = re.compile(r"(?<![\w./-])(\d+(?:,\d{3})*(?:\.\d+)?)(x\b|\s?(?:dB|%|s|ms|MiB)(?![\w]))?(?![\w/-]|\.\d)")
_LINK = re.compile(r"bench/results/([\w.]+?)\.(?:md|json|jsonl|png)")
# A line of a table may set a contender, a rival and a control side by side.
_ROWS_OF_A_LINE = 3
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


class Claim(NamedTuple):
    """A number that README states: how it is written, its unit or "", its line."""

    text: str
    unit: str
    line: int


def check() -> None:
    """Print every number without backing, and exit with 1 if there is one."""
    unbacked = list(find_unbacked(README.read_text(), RESULTS))
    for claim in unbacked:
        print(f"README.md:{claim.line}: {claim.text}{claim.unit} stands in no result that its section links to")
    if unbacked:
        raise SystemExit(1)
    print("every measured number of README.md stands in bench/results")


def find_unbacked(text: str, results: Path) -> Iterator[Claim]:
    """Claims of a README that no linked JSON holds, rounded as they are."""
    for section in _sections(text):
        names = {name for _, line in section for name in _LINK.findall(line)}
        rows = [row for name in sorted(names) for row in _rows(results / f"{name}.json")]
        for line in section:
            claims = [claim for claim in _claims([line]) if claim.unit or (names and "." in claim.text)]
            limit = _ROWS_OF_A_LINE if line[1].startswith("|") else len(claims)
            yield from _not_covered(claims, rows, limit)


def _not_covered(claims: list[Claim], rows: list[list[float]], limit: int) -> Iterator[Claim]:
    """Claims that remain when the rows that back most of them have been taken, one after the other."""
    for _ in range(limit):
        if not claims or not rows:
            break
        best = max(rows, key=lambda row: sum(_is_backed(claim, row) for claim in claims))
        claims = [claim for claim in claims if not _is_backed(claim, best)]
    yield from claims


def _sections(text: str) -> Iterator[list[tuple[int, str]]]:
    """Numbered lines without code; fences without a language are what a program printed, and stay."""
    section: list[tuple[int, str]] = []
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
        section.append((number, line))
    yield section


def _claims(section: list[tuple[int, str]]) -> Iterator[Claim]:
    for number, line in section:
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|(?:Python|torch|inductor) \d+\.\d+", " ", line)
        for match in _TOKEN.finditer(prose):
            yield Claim(match[1], match[2] or "", number)


def _rows(path: Path) -> Iterator[list[float]]:
    """The numbers of every row of a result, those inside of strings included; its notes are a row. What it ran on is none."""
    if path.exists():
        result = json.loads(path.read_text())
        for row in [*result["rows"], result.get("notes", [])]:
            yield list(_walk(row))


def _walk(entry: Any) -> Iterator[float]:
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from _walk(key)
            yield from _walk(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _walk(value)
    elif isinstance(entry, str):
        yield from (float(number) for number in _NUMBER.findall(entry))
    elif isinstance(entry, int | float) and not isinstance(entry, bool):
        yield float(entry)


def _is_backed(claim: Claim, values: list[float]) -> bool:
    """Whether a value rounds to the claim; percentages may be kept as shares, milliseconds as seconds."""
    plain = claim.text.replace(",", "")
    half = 0.5001 * 10.0 ** -(len(plain.split(".")[1]) if "." in plain else 0)
    scales = {"%": (1.0, 100.0), "ms": (1.0, 1e3)}.get(claim.unit.strip(), (1.0,))
    return any(abs(abs(value) * scale - float(plain)) <= half for value in values for scale in scales)
