import pytest
import torch

from vitcompress.numerics.packing import pack, packed_size, unpack


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 3, 5)])
def test_round_trip(shape, bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, shape).to(torch.int8 if signed else torch.uint8)
    codes.flatten()[0] = low

    packed = pack(codes, bits)
    found = unpack(packed, bits, shape, signed=signed)

    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(codes.numel(), bits)
    assert found.dtype == codes.dtype
    assert torch.equal(found, codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_every_code_survives(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.arange(low, low + 2**bits).to(torch.int8 if signed else torch.uint8)

    assert torch.equal(
        unpack(pack(codes, bits), bits, tuple(codes.shape), signed=signed), codes
    )


def test_four_bit_codes_fill_a_byte_low_nibble_first():
    assert pack(torch.tensor([0x1, 0x2, 0xF]), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([-1, 3], dtype=torch.int8), 4).tolist() == [0x3F]


def test_two_bit_codes_fill_a_byte_low_bits_first():
    assert pack(torch.tensor([1, 2, 3, 0, 2]), 2).tolist() == [0b00_11_10_01, 0b10]


def test_three_bit_codes_straddle_bytes():
    # Code 2 occupies bits 6 to 8: two of them in byte 0, one in byte 1.
    assert pack(torch.tensor([0, 0, 7]), 3).tolist() == [0b1100_0000, 0b1]


def test_eight_codes_of_three_bits_take_three_bytes():
    assert packed_size(8, 3) == 3
    assert packed_size(9, 3) == 4
    assert packed_size(0, 4) == 0


def test_a_wrong_number_of_bytes_is_refused():
    packed = pack(torch.tensor([1, 2, 3, 4]), 4)

    with pytest.raises(ValueError, match="6 codes of 4 bits take 3 bytes, found 2"):
        unpack(packed, 4, (2, 3), signed=False)
