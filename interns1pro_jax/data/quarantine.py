"""Records that cannot be used are set aside by name and counted by reason; too many of them stop the run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from interns1pro_jax.data.records import DataError

_log = logging.getLogger(__name__)
_NAMED = 10  # warnings; the names of the rest are in `Quarantine.faults`
_KEPT = 10_000
# The share is taken of at least so many records, so that a bad one among the first few does not end the run.
_FEWEST = 1000


class Fault(NamedTuple):
    """A record that cannot be used: where it is, the kind of its fault, and what is wrong in words."""

    name: str
    reason: str
    detail: str


class Counts(NamedTuple):
    """Records that were read, and those among them that could not be used, by reason."""

    records: int
    reasons: Mapping[str, int]

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(self.records + other.records, dict(Counter(self.reasons) + Counter(other.reasons)))

    def metrics(self) -> dict[str, float]:
        """For the run's log."""
        by_reason = {f"data/quarantined/{reason.replace(' ', '_')}": float(count) for reason, count in self.reasons.items()}
        return {"data/records": float(self.records), "data/quarantined": float(sum(self.reasons.values())), **by_reason}


class Quarantine:
    """What this process could not use.

    Args:
      max_share: the share of the records read that may be bad before `read` raises.

    Attributes:
      faults: by name of the record.
    """

    def __init__(self, max_share: float):
        self._max_share = max_share
        self._records = 0
        self._reasons: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}

    def read(self, records: int, faults: Sequence[Fault]) -> None:
        """Counts records that were read, and sets those aside that failed; one that fails again counts once.

        Raises:
          DataError: more than the allowed share is bad.
        """
        self._records += records
        for fault in faults:
            if fault.name in self.faults:
                continue
            if len(self.faults) < _KEPT:
                self.faults[fault.name] = fault
            self._reasons[fault.reason] += 1
            bad = self._reasons.total()
            _log.log(logging.WARNING if bad <= _NAMED else logging.DEBUG, "quarantined %s: %s", fault.name, fault.detail)
            if bad > self._max_share * max(self._records, _FEWEST):
                raise DataError(
                    f"{bad} of {self._records} records are bad ({self._list()}), more than the allowed share {self._max_share:g}; "
                    f"the last is {fault.name}: {fault.detail} Repair the data, or raise max_bad_share if this is expected."
                )

    @property
    def counts(self) -> Counts:
        """All that this process has read."""
        return Counts(self._records, self.reasons)

    @property
    def reasons(self) -> Mapping[str, int]:
        """Records set aside, by reason."""
        return dict(self._reasons)

    def _list(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
