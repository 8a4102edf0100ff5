"""Accepted requests in a file: whoever dies, nobody who was told "accepted" is forgotten."""

import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from afcache.serving.fleet.asked import Asked, Seen, State

# What is large is apart from what is looked through.
_TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, asked TEXT NOT NULL, state TEXT NOT NULL, accepted REAL NOT NULL, ended REAL,
    done INTEGER NOT NULL DEFAULT 0, steps INTEGER NOT NULL DEFAULT 0, pattern TEXT NOT NULL DEFAULT '', replica TEXT,
    moved INTEGER NOT NULL DEFAULT 0, resumed INTEGER, error TEXT
);
CREATE INDEX IF NOT EXISTS by_end ON requests (state, ended);
CREATE TABLE IF NOT EXISTS data (id TEXT, kind TEXT, bytes BLOB, PRIMARY KEY (id, kind));
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_OPEN = "state = 'waiting'"


class Entry(NamedTuple):
    """A request that is not done.

    Attributes:
        id: by which it is known.
        asked: what is to be drawn.
        checkpoint: with which it goes on, or None.
        done: steps behind the checkpoint.

    """

    id: str
    asked: Asked
    checkpoint: bytes | None = None
    done: int = 0


class Book:
    """Requests, and what became of them, in one SQLite file on a disk of this machine.

    Args:
        path: of the file; it is made where there is none.
        kept: requests that are done and still known, the latest of them; a request's images are gone with it.

    Raises:
        sqlite3.Error: it cannot be written, or is no such file.

    """

    def __init__(self, path: Path, *, kept: int = 1000) -> None:
        self._kept = kept
        # One thread at a time: the ledger's.
        self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.executescript(_TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def model(self, name: str) -> str:
        """Of which model its open requests are: the one named here, where there are none."""
        if not self._base.execute(f"SELECT count(*) FROM requests WHERE {_OPEN}").fetchone()[0]:
            self._base.execute("INSERT OR REPLACE INTO facts VALUES ('model', ?)", (name,))
        return self._base.execute("SELECT value FROM facts WHERE name = 'model'").fetchone()[0]

    def accept(self, name: str, asked: Asked) -> bool:
        """Write a request down; whether it is new."""
        row = (name, asked.model_dump_json(), "waiting", time.time())
        done = self._base.execute("INSERT OR IGNORE INTO requests (id, asked, state, accepted) VALUES (?, ?, ?, ?)", row)
        return done.rowcount == 1

    def asked(self, name: str) -> str | None:
        """What a request asks for, as JSON; None of one that is not known, or no more."""
        row = self._base.execute("SELECT asked FROM requests WHERE id = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def unfinished(self) -> list[Entry]:
        """All that are not done, the first accepted first; one that cannot be read fails."""
        found = []
        rows = self._base.execute(f"SELECT id, asked, done FROM requests WHERE {_OPEN} ORDER BY accepted, rowid").fetchall()
        for name, asked, done in rows:
            try:
                found.append(Entry(name, Asked.model_validate_json(asked), self._read(name, "checkpoint"), done))
            except ValidationError as error:
                self.fail(name, f"it was written by another version: {error.error_count()} fields are not as they are now")
        return found

    def open(self) -> set[str]:
        """Names of all that are not done."""
        return {name for (name,) in self._base.execute(f"SELECT id FROM requests WHERE {_OPEN}")}

    def keep(self, name: str, checkpoint: bytes, *, done: int, steps: int, pattern: str) -> None:
        """Where it goes on if its replica dies."""
        self._write(name, "checkpoint", checkpoint)
        self._set(name, done=done, steps=steps, pattern=pattern)

    def forget(self, name: str) -> None:
        """It goes on from nowhere."""
        self._base.execute("DELETE FROM data WHERE id = ? AND kind = 'checkpoint'", (name,))
        self._set(name, done=0, pattern="")

    def move(self, name: str, resumed: int) -> None:
        """Count a replica that died under it; the next one goes on after so many steps."""
        self._base.execute(f"UPDATE requests SET moved = moved + 1, resumed = ? WHERE id = ? AND {_OPEN}", (resumed, name))

    def draw(self, name: str, image: bytes, pattern: str, replica: str) -> None:
        """It has its image."""
        self._write(name, "image", image)
        self._end(name, "drawn", done=len(pattern), steps=len(pattern), pattern=pattern, replica=replica)

    def fail(self, name: str, error: str) -> None:
        """It will have none."""
        self._end(name, "failed", error=error)

    def cancel(self, name: str, **how_far: int | str) -> bool:
        """Nobody wants it; whether it was not done. How far it was stays known."""
        return self._end(name, "cancelled", **how_far)

    def look(self, name: str) -> Seen | None:
        """What is known of it; None of one that is not, or no more."""
        columns = "state, done, steps, pattern, replica, moved, resumed, error, ended - accepted"
        row = self._base.execute(f"SELECT {columns} FROM requests WHERE id = ?", (name,)).fetchone()
        if row is None:
            return None
        fields: dict[str, Any] = dict(zip((*columns.split(", ")[:-1], "seconds"), row, strict=True))
        if fields["state"] != "drawn":
            fields["seconds"] = None
        return Seen(id=name, **fields)

    def image(self, name: str) -> bytes | None:
        """Its PNG, where it has one."""
        return self._read(name, "image")

    def count(self) -> dict[str, int]:
        """Requests by their state."""
        return dict(self._base.execute("SELECT state, count(*) FROM requests GROUP BY state"))

    def _read(self, name: str, kind: str) -> bytes | None:
        row = self._base.execute("SELECT bytes FROM data WHERE id = ? AND kind = ?", (name, kind)).fetchone()
        return None if row is None else row[0]

    def _write(self, name: str, kind: str, data: bytes) -> None:
        self._base.execute("INSERT OR REPLACE INTO data VALUES (?, ?, ?)", (name, kind, data))

    def _set(self, name: str, **values: Any) -> int:
        columns = ", ".join(f"{column} = ?" for column in values)
        done = self._base.execute(f"UPDATE requests SET {columns} WHERE id = ? AND {_OPEN}", (*values.values(), name))
        return done.rowcount

    def _end(self, name: str, state: State, **values: Any) -> bool:
        if not self._set(name, state=state, ended=time.time(), **values):
            return False
        self._base.execute("DELETE FROM data WHERE id = ? AND kind = 'checkpoint'", (name,))
        gone = f"SELECT id FROM requests WHERE NOT {_OPEN} ORDER BY ended DESC LIMIT -1 OFFSET ?"
        for (old,) in self._base.execute(gone, (self._kept,)).fetchall():
            self._base.execute("DELETE FROM requests WHERE id = ?", (old,))
            self._base.execute("DELETE FROM data WHERE id = ?", (old,))
        return True
