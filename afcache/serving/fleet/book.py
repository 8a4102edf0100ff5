"""Accepted requests in a file: whoever dies, nobody who was told "accepted" is forgotten."""

import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

from afcache.serving.fleet.asked import Asked, Seen, State

_TABLE = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, asked TEXT NOT NULL, state TEXT NOT NULL, accepted REAL NOT NULL, moved INTEGER NOT NULL DEFAULT 0,
    checkpoint BLOB, pattern TEXT NOT NULL DEFAULT '', replica TEXT, image BLOB, error TEXT, ended REAL
)
"""
_OPEN = "state NOT IN ('drawn', 'failed', 'cancelled')"


class Entry(NamedTuple):
    """A request that is not done.

    Attributes:
        id: by which it is known.
        asked: what is to be drawn.
        checkpoint: with which it goes on, or None.

    """

    id: str
    asked: Asked
    checkpoint: bytes | None


class Book:
    """Requests, and what became of them, in one SQLite file.

    Args:
        path: of the file; it is made where there is none.
        kept: requests that are done and still known, the latest of them; a request's images are gone with it.

    """

    def __init__(self, path: Path, *, kept: int = 1000) -> None:
        self._kept = kept
        # One thread at a time: the ledger's.
        self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute(_TABLE)

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def accept(self, name: str, asked: Asked) -> bool:
        """Write a request down; whether it is new."""
        row = (name, asked.model_dump_json(), "waiting", time.time())
        done = self._base.execute("INSERT OR IGNORE INTO requests (id, asked, state, accepted) VALUES (?, ?, ?, ?)", row)
        return done.rowcount == 1

    def unfinished(self) -> list[Entry]:
        """All that are not done, the first accepted first."""
        rows = self._base.execute(f"SELECT id, asked, checkpoint FROM requests WHERE {_OPEN} ORDER BY accepted, rowid")
        return [Entry(name, Asked.model_validate_json(asked), checkpoint) for name, asked, checkpoint in rows]

    def keep(self, name: str, checkpoint: bytes | None) -> None:
        """Where it goes on if its replica dies."""
        self._base.execute("UPDATE requests SET checkpoint = ? WHERE id = ?", (checkpoint, name))

    def move(self, name: str) -> None:
        """Count a replica that died under it."""
        self._base.execute("UPDATE requests SET moved = moved + 1 WHERE id = ?", (name,))

    def draw(self, name: str, image: bytes, pattern: str, replica: str) -> None:
        """It has its image."""
        self._end(name, "drawn", image=image, pattern=pattern, replica=replica)

    def fail(self, name: str, error: str) -> None:
        """It will have none."""
        self._end(name, "failed", error=error)

    def cancel(self, name: str) -> bool:
        """Nobody wants it; whether it was not done."""
        return self._end(name, "cancelled")

    def look(self, name: str) -> Seen | None:
        """What is known of it; None of one that is not, or no more."""
        columns = "state, moved, pattern, replica, error, ended - accepted"
        row = self._base.execute(f"SELECT {columns} FROM requests WHERE id = ?", (name,)).fetchone()
        if row is None:
            return None
        state, moved, pattern, replica, error, seconds = row
        done = len(pattern)
        return Seen(
            id=name,
            state=state,
            done=done,
            steps=done,
            pattern=pattern,
            replica=replica,
            moved=moved,
            seconds=seconds if state == "drawn" else None,
            error=error,
        )

    def image(self, name: str) -> bytes | None:
        """Its PNG, where it has one."""
        row = self._base.execute("SELECT image FROM requests WHERE id = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def count(self) -> dict[str, int]:
        """Requests by their state."""
        return dict(self._base.execute("SELECT state, count(*) FROM requests GROUP BY state"))

    def _end(self, name: str, state: State, **values: str | bytes) -> bool:
        columns = "".join(f", {column} = ?" for column in values)
        done = self._base.execute(
            f"UPDATE requests SET state = ?, ended = ?, checkpoint = NULL{columns} WHERE id = ? AND {_OPEN}",
            (state, time.time(), *values.values(), name),
        )
        self._base.execute(
            f"DELETE FROM requests WHERE NOT {_OPEN} AND id NOT IN "
            f"(SELECT id FROM requests WHERE NOT {_OPEN} ORDER BY ended DESC LIMIT ?)",
            (self._kept,),
        )
        return done.rowcount == 1
