"""Documents that cannot be used are set aside by name and counted; too many of them stop the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from interns1pro_jax.data.records import DataError

_log = logging.getLogger(__name__)
_NAMED = 10  # warnings; the names of the rest are in `Quarantine.reasons`


class Quarantine:
    """Keeps the names of bad documents and why they are bad. Safe to use from several threads.

    Args:
      documents: how many documents there are in all.
      max_share: the share of them that may be bad before `add` raises.
    """

    def __init__(self, documents: int, max_share: float):
        self._documents = documents
        self._max_share = max_share
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Sets a document aside; one that fails again counts once.

        Raises:
          DataError: more than the allowed share is bad.
        """
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = reason
            bad = len(self._reasons)
        _log.log(logging.WARNING if bad <= _NAMED else logging.DEBUG, "quarantined %s: %s", name, reason)
        if bad > self._max_share * self._documents:
            raise DataError(
                f"{bad} of {self._documents} documents are bad, more than the allowed share {self._max_share:g}; the last is {name}: "
                f"{reason} Repair the data, or raise max_bad_share if this is expected."
            )

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why, by document."""
        return dict(self._reasons)

    def metrics(self) -> dict[str, float]:
        """Counts for the run's log."""
        return {"data/documents": float(self._documents), "data/quarantined": float(len(self._reasons))}
