"""Results as people read them: every Markdown file of bench/results is made of the JSON beside it, and of nothing else.

python -m bench.record.render
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.record.naming import RESULTS

# Everything else that a result says of itself is a line of its head.
_BODY = ("title", "notes", "rows", "shown")


def render(result: dict[str, Any]) -> str:
    """A result as Markdown: title, what it ran on, notes, and the rows that are shown.

    Args:
        result: as its JSON holds it: `title`, `notes`, `rows`, and `shown` where the readable rows are others.

    """
    facts = [f"- {key}: {value}" for key, value in result.items() if key not in _BODY]
    rows = result.get("shown", result["rows"])
    return "\n".join([f"# {result['title']}", "", *facts, "", *result["notes"], "", table(rows), ""])


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; floats with three digits, at least two of them behind the point."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_show(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def render_all(folder: Path) -> Iterator[Path]:
    """Write the Markdown of every JSON again; yield those whose text was another before."""
    for source in sorted(folder.glob("*.json")):
        path, text = source.with_suffix(".md"), render(json.loads(source.read_text()))
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            yield path


def main() -> None:
    """Render everything, and name what has changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the results (default bench/results)")
    changed = [path.name for path in render_all(parser.parse_args().folder)]
    print("\n".join(changed) or "every table is what its JSON renders to")


if __name__ == "__main__":
    main()
