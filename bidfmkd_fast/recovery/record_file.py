"""Append checksummed records to a file, so that they survive the end of the process at any moment.

The file is `MAGIC`, then records of `<u4 length> <u4 crc32> <payload>`. Every record is written by
one call and nothing waits for the disk, so the last records may be lost only when the machine
itself loses power. A record that was cut off is noticed by its length or checksum and dropped.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

MAGIC = b"bidfmkd journal 1\n"
_FRAME = struct.Struct("<II")


class RecordFile:
    """A file that records are appended to.

    Attributes:
        end: bytes up to the end of the last whole record; 0 without any.
        cut_off: bytes behind `end`; they belong to a record that is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = self.cut_off = 0
        self._file: FileIO | None = None

    @property
    def is_open(self) -> bool:
        """Return True from the first `append` until `close`."""
        return self._file is not None

    def read(self) -> Iterator[bytes]:
        """Yield the payload of every record up to the first that is not whole; set `end`."""
        data = self.path.read_bytes()
        self.end, self.cut_off = 0, len(data)
        for payload, end in _whole_records(data):
            self.end, self.cut_off = end, len(data) - end
            yield payload

    def append(self, payload: bytes, first: bytes) -> None:
        """Append a record; a file without records first gets one with the payload `first`."""
        if self._file is None:
            self._file = self._open(first)
        framed = _framed(payload)
        record = memoryview(framed)
        while record:
            record = record[self._file.write(record) :]
        self.end += len(framed)

    def close(self) -> None:
        """Close the file; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, first: bytes) -> FileIO:
        """Open the file behind its last whole record; make it, with `first`, if it has none."""
        if not self.end:
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_bytes(MAGIC + _framed(first))
            self.end = partial.stat().st_size
            os.replace(partial, self.path)
        os.truncate(self.path, self.end)  # drops a record that was cut off
        return FileIO(self.path, "ab")


def _framed(payload: bytes) -> bytes:
    """Return the payload with its length and checksum before it."""
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _whole_records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield payload and end of every record, up to the first that is not whole."""
    if not data.startswith(MAGIC):
        return
    at = len(MAGIC)
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        payload = data[at : at + length]
        at += length
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload, at
