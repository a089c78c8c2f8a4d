"""Ragged tensors as packed bytes: the one place where arrays become messages and back.

Everything that arrives is validated: element type, sizes, checksum.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from isal import isal_zlib

from steersman.errors import ChecksumError, InvalidArgumentError
from steersman.v1 import common_pb2 as pb

_DTYPES: dict[int, np.dtype] = {
    pb.ELEMENT_TYPE_INT32: np.dtype("<i4"),
    pb.ELEMENT_TYPE_FLOAT32: np.dtype("<f4"),
}
_ELEMENT_TYPES = {dtype: element for element, dtype in _DTYPES.items()}

assert sys.byteorder == "little", "arrays are sent as they lie in memory"


REQUEST_BYTES = 8 * 1024 * 1024
"""Largest message that a service takes. Reading one holds everybody else's calls up, by some ten milliseconds; callers
with more ask several times (`in_parts`)."""
REQUEST_ITEMS = 16_384
"""Most items of a request for rewards or log-probabilities."""
_ITEM_BYTES = 32
"""What the wire adds to an item: its lengths, and what is sent with it."""


def in_parts(sizes: Sequence[int], most: int = REQUEST_BYTES - 2**16) -> list[slice]:
    """Neighbouring items that go into one request each; an item that is larger goes alone, and is refused.

    Args:
        sizes: bytes of every item.
        most: bytes that a request has for its items.
    """
    found: list[slice] = []
    begin = room = 0
    for index, size in enumerate(sizes):
        room -= size + _ITEM_BYTES
        if room < 0 or index - begin == REQUEST_ITEMS:
            found.append(slice(index, index + 1))
            begin, room = index, most - size - _ITEM_BYTES
        else:
            found[-1] = slice(begin, index + 1)
    return found


def pack_rows(rows: Sequence[np.ndarray], dtype: type = np.int32) -> pb.RaggedTensor:
    """Packs one-dimensional rows of unequal length.

    Args:
        rows: arrays of shape [length], any integer or float type that fits `dtype`.
        dtype: np.int32 or np.float32.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    arrays = [np.asarray(row) for row in rows]
    for index, array in enumerate(arrays):
        if array.ndim != 1:
            raise InvalidArgumentError(f"row {index} has {array.ndim} dimensions; rows must have one")
    data = b"".join(np.ascontiguousarray(array, dtype=kind).tobytes() for array in arrays)
    return pb.RaggedTensor(
        dtype=_ELEMENT_TYPES[kind],  # type: ignore[arg-type]
        lengths=[len(array) for array in arrays],
        data=data,
        crc32=isal_zlib.crc32(data),
    )


def unpack_rows(tensor: pb.RaggedTensor, dtype: type, field: str) -> list[np.ndarray]:
    """Unpacks and validates; the rows are read-only views of the message's bytes.

    Args:
        tensor: the message.
        dtype: the element type that the field must have, np.int32 or np.float32.
        field: name of the field, for the error.

    Raises:
        InvalidArgumentError: wrong element type or sizes.
        ChecksumError: the bytes do not have their checksum.
    """
    expected = np.dtype(dtype).newbyteorder("<")
    kind = _DTYPES.get(tensor.dtype)
    if kind is None or kind != expected:
        name = pb.ElementType.Name(tensor.dtype) if tensor.dtype in pb.ElementType.values() else str(tensor.dtype)
        raise InvalidArgumentError(
            f"{field}.dtype is {name}; it must be {pb.ElementType.Name(_ELEMENT_TYPES[expected])}"
        )
    total = sum(tensor.lengths)
    if total * kind.itemsize != len(tensor.data):
        raise InvalidArgumentError(
            f"{field}.data has {len(tensor.data)} bytes, but its lengths need {total} x {kind.itemsize}; "
            "the message was cut or packed wrongly"
        )
    if tensor.HasField("crc32") and isal_zlib.crc32(tensor.data) != tensor.crc32:
        raise ChecksumError(f"{field}.data does not have its checksum; send it again")
    flat = np.frombuffer(tensor.data, dtype=kind)
    ends = np.cumsum(np.asarray(tensor.lengths, dtype=np.int64))
    return [flat[end - length : end] for end, length in zip(ends, tensor.lengths, strict=True)]
