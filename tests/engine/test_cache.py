import pytest
import torch

from vitcompress.engine.cache import ConstantRows, RowStore
from vitcompress.errors import PassError

CPU = torch.device("cpu")


def store(memory_bytes=2**20, half=False, images=10):
    return RowStore(images, memory_bytes, half, CPU)


def filled(rows, values, parts=1):
    for numbers in torch.arange(10).split(4):
        rows.put(numbers, values.unflatten(0, (10, parts))[numbers].flatten(0, 1))


@pytest.mark.parametrize("memory_bytes", [2**20, 0], ids=["memory", "file"])
def test_what_was_put_is_taken_in_any_order(memory_bytes):
    values, chosen = torch.randn(10, 3, 4), torch.tensor([7, 0, 3])

    with store(memory_bytes) as room:
        rows = room.room((3, 4), torch.float32)
        filled(rows, values)

        assert torch.equal(rows.take(chosen), values[chosen])
        assert room.files == (0 if memory_bytes else 1)


def test_windows_of_one_image_stay_together():
    values = torch.randn(10 * 4, 5)

    with store() as room:
        rows = room.room((5,), torch.float32, parts=4)
        filled(rows, values, parts=4)

        found = rows.take(torch.tensor([2, 9]))

    assert torch.equal(found, torch.cat([values[8:12], values[36:40]]))


def test_memory_stays_below_the_limit_and_what_is_too_much_goes_to_files():
    one = 10 * 100 * 4

    with store(2 * one) as room:
        kept = [room.room((100,), torch.float32) for _ in range(5)]

        assert room.memory_bytes == 2 * one
        assert room.files == 3
        room.keep_only([kept[0], kept[4]])
        assert (room.memory_bytes, room.files) == (one, 1)
        room.room((100,), torch.float32)
        assert (room.memory_bytes, room.files) == (2 * one, 1)


def test_files_are_gone_at_the_end():
    with store(0) as room:
        room.room((3,), torch.float32)
        (folder,) = {path.parent for _, path in room._rows}
        assert len(list(folder.iterdir())) == 1

    assert not folder.exists()


def test_half_precision_halves_the_room_and_rounds():
    values = torch.randn(10, 100)

    with store(half=True) as room:
        rows = room.room((100,), torch.float32)
        filled(rows, values)

        assert room.memory_bytes == 10 * 100 * 2
        found = rows.take(torch.arange(10))
        assert found.dtype == torch.float32
        assert torch.equal(found, values.half().float())


def test_half_precision_keeps_integers_whole():
    with store(half=True) as room:
        rows = room.room((2,), torch.int64)
        rows.put(torch.tensor([1]), torch.tensor([[70001, 3]]))

        assert rows.take(torch.tensor([1])).tolist() == [[70001, 3]]


def test_a_value_beyond_half_precision_is_an_error_that_names_the_setting():
    with store(half=True) as room, pytest.raises(PassError, match="set cache_half: false"):
        room.room((1,), torch.float32).put(torch.tensor([0]), torch.tensor([[1e6]]))


def test_a_constant_is_the_same_for_all_images():
    rows = ConstantRows(torch.tensor([1.0, 2.0]))

    rows.put(torch.tensor([0]), torch.zeros(2))

    assert rows.take(torch.tensor([5, 6])).tolist() == [1.0, 2.0]
