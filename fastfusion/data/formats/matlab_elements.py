"""Look over the elements of a v5 .mat before scipy reads them.

scipy's compiled reader believes the tag before an array's values: one wrong byte there ends the
process with a segmentation fault. What is checked follows MathWorks' "MAT-File Format", chapter 1:
a file is a header of 128 bytes and a list of elements; an element is a tag of 8 bytes, its type and
its length, and then its content; a matrix holds its flags, dimensions, name and values, each an
element again.
"""

from __future__ import annotations

import struct
import zlib
from math import prod
from pathlib import Path

HEADER = 128
ENDIAN = {b"IM": "<", b"MI": ">"}
INT32, UINT32, MATRIX, COMPRESSED = 5, 6, 14, 15
#: Bytes of one value of each numeric type of an element.
BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}
NUMERIC_CLASSES = range(6, 16)  # double, single and the integers
COMPLEX = 0x0800
#: A matrix's flags, dimensions and name (at most 63 characters) lie within so many bytes.
MATRIX_HEAD = 1024


def check_elements(path: Path) -> set[str]:
    """Raise ValueError if the tag of a numeric array's values cannot be believed.

    v4 files have no such tags and pass.

    Returns:
        Names of complex arrays; their imaginary part was not looked at, so do not read them.
    """
    complex_arrays: set[str] = set()
    size = path.stat().st_size
    with path.open("rb") as file:
        order = ENDIAN.get(file.read(HEADER)[126:128])
        if order is None:
            return complex_arrays
        while file.tell() + 8 <= size:
            kind, length = struct.unpack(order + "II", file.read(8))
            following = file.tell() + length
            if following > size:
                raise ValueError(f"it is truncated: it lacks {following - size} bytes")
            head = file.read(min(length, MATRIX_HEAD))
            if kind == COMPRESSED:
                head = zlib.decompressobj().decompress(head, MATRIX_HEAD)
                kind, head = struct.unpack_from(order + "I", head)[0], head[8:]
            if kind == MATRIX and head:
                name, is_complex = _check_matrix(head, order)
                if is_complex:
                    complex_arrays.add(name)
            file.seek(following)
    return complex_arrays


def _check_matrix(head: bytes, order: str) -> tuple[str, bool]:
    """Name of a matrix, and whether it is complex."""
    kind, length, start, position = _element(head, 0, order)
    flags = struct.unpack_from(order + "I", head, start)[0]
    if (kind, length) != (UINT32, 8):
        raise ValueError("it is damaged: the flags of an array are not where they belong")
    kind, length, start, position = _element(head, position, order)
    if kind != INT32 or length % 4 or start + length > len(head):
        raise ValueError("it is damaged: the dimensions of an array are not where they belong")
    shape = struct.unpack_from(f"{order}{length // 4}i", head, start)
    _, length, start, position = _element(head, position, order)
    name = head[start : start + length].decode("latin1")
    if flags & 0xFF in NUMERIC_CLASSES:
        kind, length, _, _ = _element(head, position, order)
        if len(shape) < 2 or min(shape) < 0 or length != BYTES.get(kind, -1) * prod(shape):
            raise ValueError(f"it is damaged: {name!r} is said to be {shape}, in {length} bytes")
    return name, bool(flags & COMPLEX)


def _element(data: bytes, position: int, order: str) -> tuple[int, int, int, int]:
    """Type and length of the element at a position, where its content and the next one start."""
    kind, length = struct.unpack_from(order + "II", data, position)
    if kind >> 16:  # at most 4 bytes of content lie inside the tag itself
        return kind & 0xFFFF, kind >> 16, position + 4, position + 8
    start = position + 8
    return kind, length, start, start + length + -length % 8
