"""Codes of 2, 3 and 4 bits packed into bytes.

Bit order, stated once: code i occupies bits ``i * bits`` to ``i * bits + bits - 1`` of the
whole, counted from the least significant bit of byte 0. For 4 and 2 bits this is the layout of
ONNX INT4 and INT2 (low nibble first); 3 bits straddle bytes, eight codes in three.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "packed_size", "unpack"]


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that ``count`` codes of ``bits`` bits occupy."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the codes packed into bytes.

    Args:
        codes: Whole numbers in ``[0, 2^bits - 1]`` or signed ones in ``[-2^(bits-1),
            2^(bits-1) - 1]``, any shape, integer dtype.
        bits: 1 to 8.

    Returns:
        ``[packed_size(codes.numel(), bits)]`` uint8.
    """
    unsigned = codes.flatten().to(torch.int16).numpy() & (2**bits - 1)
    spread = np.unpackbits(
        unsigned.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little"
    )
    return torch.from_numpy(np.packbits(spread.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Return the codes of :func:`pack`, ``shape``, int8 when signed and uint8 otherwise.

    Raises:
        ValueError: The bytes are not as many as ``shape`` needs.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, "
            f"found {packed.numel()}"
        )
    spread = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    codes = np.packbits(spread.reshape(count, bits), axis=1, bitorder="little").reshape(shape)
    unsigned = torch.from_numpy(codes)
    if not signed:
        return unsigned
    half = 2 ** (bits - 1)
    centred: Tensor = (unsigned.to(torch.int16) + half) % (2 * half) - half
    return centred.to(torch.int8)
