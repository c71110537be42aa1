"""Random access to documents: of record files, or in memory."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from array_record.python import array_record_module

from interns1pro_jax.data import records
from interns1pro_jax.data.records import DataError, Document, RecordFile

# An open reader keeps a file descriptor and its index for good, so only so many stay open.
_MAX_OPEN = 64


class RecordSource:
    """The documents of several files, in the order given: `source[i]`. It is a random-access Grain source.

    Args:
      directory: where the files are.
      files: what was written there.

    Raises:
      DataError: a file is absent or has another size than was written.
    """

    def __init__(self, directory: Path, files: Sequence[RecordFile]):
        for file in files:
            path = directory / file.name
            if not path.is_file() or path.stat().st_size != file.size:
                found = f"has {path.stat().st_size} bytes" if path.is_file() else "is absent"
                raise DataError(f"{path} {found}, but {file.size} bytes were written; prepare the data again.")
        self._paths = [directory / file.name for file in files]
        self._ends = list(itertools.accumulate(file.records for file in files))
        self._readers: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        """Document `index`.

        Raises:
          DataError: the record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}.")
        file, row = self._place(index)
        try:
            # `read([row])` would cost time proportional to the records in the file; a range does not.
            with self._lock:
                (record,) = self._reader(file).read(row, row + 1)
        except RuntimeError as error:
            raise DataError(f"damaged record ({error}).") from error
        return records.decode(record)

    def name(self, index: int) -> str:
        """Where document `index` is, readable or not."""
        file, row = self._place(index)
        return f"{self._paths[file]}[{row}]"

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def _reader(self, file: int) -> array_record_module.ArrayRecordReader:
        if file in self._readers:
            self._readers.move_to_end(file)
        else:
            if len(self._readers) == _MAX_OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[file] = array_record_module.ArrayRecordReader(str(self._paths[file]))
        return self._readers[file]


class DocumentList:
    """Documents in memory as a source."""

    def __init__(self, documents: Sequence[Document]):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]

    def name(self, index: int) -> str:
        return self._documents[index].name
