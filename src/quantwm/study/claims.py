"""Claims: which worker computes what, so that workers on one folder do not do the same twice.

A claim is a file that its worker touches every few seconds. One whose worker died, on this host, or
has not been touched for a minute, is taken over. Claims only save work: should two workers hold
the same one after all (a worker that slept), both write the same content, each file whole.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantwm.files import write_new

HEARTBEAT = 5.0
"""Seconds between two touches of a claim."""
STALE = 60.0
"""Seconds without a touch after which a claim is free."""


class Claims:
    """The claims in a folder.

    Args:
        folder: where claims lie; made with the first one.
        heartbeat, stale: seconds, as `HEARTBEAT` and `STALE`.
    """

    def __init__(self, folder: Path, *, heartbeat: float = HEARTBEAT, stale: float = STALE) -> None:
        self._folder, self._heartbeat, self._stale = folder, heartbeat, stale

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Hold a claim while the context lasts; yields whether it was free.

        Raises:
            QuantWMError: the folder cannot be written.
        """
        token = self._take(name)
        if token is None:
            yield False
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(name, stop), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            stop.set()
            thread.join()
            # Only one's own: a claim that another worker took over stays.
            if (self._read(name) or {}).get("token") == token:
                self._path(name).unlink(missing_ok=True)

    def holder(self, name: str) -> dict[str, Any] | None:
        """Who holds a claim: host, pid and time of start; None if it is free."""
        found = self._read(name)
        return None if found is None or self._is_stale(name, found) else found

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.claim"

    def _take(self, name: str) -> str | None:
        """A new claim's token, or None if the claim is held."""
        path = self._path(name)
        found = self._read(name)
        if found is not None:
            if not self._is_stale(name, found):
                return None
            self._remove(path, found)
        token = uuid.uuid4().hex
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
            "token": token,
        }
        return token if write_new(path, json.dumps(content)) else None

    def _remove(self, path: Path, stale: dict[str, Any]) -> None:
        """Remove a stale claim, unless another worker was faster."""
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        with suppress(OSError):
            if _parsed(aside).get("token") != stale.get("token"):
                os.link(aside, path)  # a new claim was renamed: put it back
        with suppress(OSError):
            aside.unlink()

    def _read(self, name: str) -> dict[str, Any] | None:
        """A claim's content; {} if it is unreadable, None if there is none."""
        path = self._path(name)
        return _parsed(path) if path.exists() else None

    def _is_stale(self, name: str, found: dict[str, Any]) -> bool:
        pid = found.get("pid")
        if found.get("host") == socket.gethostname() and isinstance(pid, int) and not _alive(pid):
            return True
        try:
            touched = self._path(name).stat().st_mtime
        except FileNotFoundError:
            return True
        return self._now() - touched > self._stale

    def _now(self) -> float:
        """The time by the clock that dates the folder's files, which may be another machine's."""
        probe = self._folder / f".now.{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def _beat(self, name: str, stop: threading.Event) -> None:
        while not stop.wait(self._heartbeat):
            try:
                os.utime(self._path(name))
            except OSError:
                return  # taken over, or the folder is gone


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
