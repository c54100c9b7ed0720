"""How is the CRC-32C of many bytes computed with NumPy alone, near the speed of memory?

A message is a polynomial over GF(2), its first byte holding the highest powers, and its checksum is the remainder of
division by P, of degree 32. P divides polynomials of a few terms, such as::

    q(x) = x^5685 + x^1362 + x^426 + 1

Squaring a polynomial over GF(2) doubles its exponents and does nothing else, so that P divides q(x^64) too. With a
message cut into words of 64 bits, ``y = x^64`` moves by one word, and ``y^5685 = y^1362 + y^426 + 1`` modulo P says: a
word may be deleted if it is added (XOR) to the words that stand 4323, 5259 and 5685 places behind it. No bit moves
within a word, no table is needed, and 4323 words are done at once.

    1. fold     all words but the last 5685, by q: three XORs for a word
    2. fold     those but the last 299, by a polynomial of six terms
    3. sum      the remainders of the single bits that are left

The bytes are taken as words from the front; those that do not fill a word stay for step 3. The message is copied into
a buffer of a fixed size, piece by piece, behind what is left of the pieces before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Buffer = bytes | bytearray | memoryview | np.ndarray[Any, Any]

# P = x^32 + x^28 + ... + 1 (RFC 3720, appendix B.4) without its highest power; the highest bit holds 1, as everywhere
# in this checksum.
_POLYNOMIAL = 0x82F63B78

# Exponents of multiples of P, besides the last term, 1. Among those with four terms and a small degree, the first has
# a great distance between its first two exponents, which is the number of words that are folded at once; the second
# likewise, among those with six terms. `tests` show that P divides them.
_LONG_FOLD = (5685, 1362, 426)
_SHORT_FOLD = (299, 142, 134, 62, 21)

_WORD_BYTES = 8
# With 5685 words before it, a piece fills 300 KiB, which stay in the second cache.
_PIECE_WORDS = 1 << 15
# What step 3 may find: the words that step 2 leaves, and a part of one.
_BITS_MAX = 8 * _WORD_BYTES * (_SHORT_FOLD[0] + 1)

_ONES = 0xFFFFFFFF
# Of the checksums that a file stores: see `mask`.
_MASK_DELTA = 0xA282EAD8


def crc32c(data: Buffer) -> int:
    """The CRC-32C (Castagnoli) of bytes.

    Args:
      data: Contiguous bytes, of any number.

    Returns:
      The checksum, below 2^32.

    Example:
      >>> from jaxckpt.interop._crc import crc32c
      >>> hex(crc32c(b"123456789"))
      '0xe3069283'
    """
    return extend(0, data)


def extend(crc: int, data: Buffer) -> int:
    """The checksum of a message and more bytes, from the checksum of the message.

    A call takes a quarter of a millisecond and more for long data, so that pieces should have a megabyte or more.

    Args:
      crc: Checksum of what stands before; 0 when that is nothing.
      data: Contiguous bytes, of any number.

    Returns:
      The checksum of both.
    """
    message = np.frombuffer(data, np.uint8)
    # The remainder so far is added to the first bytes; of less than four bytes, a part of it is left over.
    register = crc ^ _ONES
    left_over = register >> 8 * min(message.size, 4)
    word_count = message.size // _WORD_BYTES
    if word_count <= _SHORT_FOLD[0]:
        head, tail = message.copy(), message[:0]
        _add_register(head, register)
    else:
        tail = message[word_count * _WORD_BYTES :]
        words = _fold_pieces(message[: word_count * _WORD_BYTES], register)
        head = _fold(words, _SHORT_FOLD).view(np.uint8)
    return _sum_of_bits(np.concatenate((head, tail))) ^ left_over ^ _ONES


def mask(crc: int) -> int:
    """A checksum as files store it: changed, since checksums of bytes that end in their checksum are all alike."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _ONES


def unmask(stored: int) -> int:
    """The checksum that a file stores changed by `mask`."""
    rotated = (stored - _MASK_DELTA) & _ONES
    return ((rotated >> 17) | (rotated << 15)) & _ONES


def _add_register(message: np.ndarray[Any, Any], register: int) -> None:
    start = message[:4]
    start ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)[: start.size]


def _fold_pieces(message: np.ndarray[Any, Any], register: int) -> np.ndarray[Any, Any]:
    """Steps before the last for a whole number of words: at most 5685 words with the same remainder."""
    kept_words = _LONG_FOLD[0]
    kept_bytes = kept_words * _WORD_BYTES
    words = np.zeros(kept_words + min(_PIECE_WORDS, message.size // _WORD_BYTES), np.uint64)
    for start in range(0, message.size, _PIECE_WORDS * _WORD_BYTES):
        piece = message[start : start + _PIECE_WORDS * _WORD_BYTES]
        work = words[: kept_words + piece.size // _WORD_BYTES]
        work_bytes = work.view(np.uint8)
        work_bytes[kept_bytes:] = piece
        if start == 0:
            _add_register(work_bytes[kept_bytes:], register)
        words[:kept_words] = _fold(work, _LONG_FOLD)
    return words[:kept_words]


def _fold(words: np.ndarray[Any, Any], exponents: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The last words, with the others added to them; as many as the degree says. Changes `words`."""
    degree = exponents[0]
    distances = [degree - exponent for exponent in (*exponents[1:], 0)]
    end = max(words.size - degree, 0)
    for start in range(0, end, distances[0]):
        stop = min(start + distances[0], end)
        moved = words[start:stop]
        for distance in distances:
            target = words[start + distance : stop + distance]
            np.bitwise_xor(target, moved, out=target)
    return words[end:]


def _sum_of_bits(message: np.ndarray[Any, Any]) -> int:
    bits = np.unpackbits(message, bitorder="little").view(np.bool_)
    remainders = _remainders_of_bits()[_BITS_MAX - bits.size :]
    return int(np.bitwise_xor.reduce(remainders[bits], initial=np.uint32(0)))


@functools.cache
def _remainders_of_bits() -> np.ndarray[Any, Any]:
    """What each bit of a message adds to its checksum; the last bit of the message is the last one."""
    remainders = np.empty(_BITS_MAX, np.uint32)
    remainder = _POLYNOMIAL
    for place in reversed(range(_BITS_MAX)):
        remainders[place] = remainder
        remainder = (remainder >> 1) ^ (_POLYNOMIAL if remainder & 1 else 0)
    return remainders
