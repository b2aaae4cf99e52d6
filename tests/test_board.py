"""The board's readings are in bytes."""

from iotd.ops import board


def test_resident_memory_is_in_bytes_and_holds_the_anonymous_part() -> None:
    assert 5_000_000 < board.anonymous_nbytes() <= board.resident_nbytes() < 8_000_000_000


def test_a_process_that_is_gone_has_no_memory() -> None:
    assert board.resident_nbytes(pid=2**22 + 1) == 0
