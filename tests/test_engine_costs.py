"""What work takes: learnt from a few units, followed when it changes, and not moved by a stall."""

import random
from collections.abc import Callable

import pytest
from engine_driver import ManualClock

from iotd.engine.costs import Costs


def machine(n_tokens: int, position: int) -> float:
    """Seconds of a run on a board that does not exist."""
    return 0.016 + 0.0098 * n_tokens + 0.0012 * n_tokens * position / 1024


class Board:
    """Runs on a manual clock, each off by a few percent."""

    def __init__(self, takes: Callable[[int, int], float] = machine) -> None:
        self.clock = ManualClock()
        self.costs = Costs(self.clock)
        self._takes = takes
        self._chance = random.Random(0)

    def read(self, n_tokens: int, position: int, *, slowness: float = 1.0, stall_s: float = 0.0) -> None:
        with self.costs.read(n_tokens, position):
            took_s = self._takes(n_tokens, position) * slowness * self._chance.gauss(1, 0.03)
            self.clock.now_s += took_s + stall_s

    def step(self, took_s: float) -> None:
        with self.costs.step(100):
            self.clock.now_s += took_s


@pytest.fixture
def board() -> Board:
    board = Board()
    for n_tokens, position in ((32, 80), (8, 80), (32, 1900), (8, 1900), (32, 80), (8, 80)):
        board.read(n_tokens, position)
    return board


def test_a_few_units_tell_sizes_and_positions_that_were_never_seen(board: Board) -> None:
    for n_tokens, position in ((20, 80), (1, 500), (40, 1200), (16, 2000)):
        assert board.costs.read_s(n_tokens, position) == pytest.approx(machine(n_tokens, position), rel=0.15)


def test_what_was_never_seen_takes_no_time() -> None:
    costs = Costs(ManualClock())
    assert (costs.read_s(32, 0), costs.step_s(0), costs.image_s(64), costs.fork_s()) == (0, 0, 0, 0)
    assert not costs.known


def test_a_stall_changes_nothing(board: Board) -> None:
    before_s = board.costs.read_s(20, 500)
    for n in range(40):
        board.read(20, 500, stall_s=3.0 if n in (10, 30) else 0.0)
    assert board.costs.read_s(20, 500) == pytest.approx(before_s, rel=0.1)


def test_a_slower_processor_shows_within_a_dozen_units_and_a_faster_one_too(board: Board) -> None:
    for slowness in (2.0, 1.0, 3.0, 0.5, 2.0):
        for _ in range(12):
            board.read(20, 500, slowness=slowness)
        assert board.costs.read_s(20, 500) == pytest.approx(slowness * machine(20, 500), rel=0.15)


def test_sizes_that_are_off_on_the_whole_are_corrected_each_by_itself() -> None:
    """A kernel for runs of up to 8 tokens, and another for longer ones."""
    board = Board(lambda n_tokens, _: 0.02 if n_tokens <= 8 else 0.3)
    for _ in range(10):
        for n_tokens in (6, 24):
            board.read(n_tokens, 0)
    for n_tokens, took_s in ((6, 0.02), (24, 0.3)):
        assert board.costs.read_s(n_tokens, 0) == pytest.approx(took_s, rel=0.15)


def test_a_slow_unit_is_slower_than_19_of_20_and_one_stall_does_not_make_it() -> None:
    board = Board()
    for n in range(200):
        board.step(0.035 * (1.2 if n % 10 == 0 else 1.0) + (2.0 if n == 100 else 0.0))
    assert board.costs.step_s(100) == pytest.approx(0.035, rel=0.01)
    assert board.costs.step_s(100, slow=True) == pytest.approx(0.042, rel=0.02)


def test_what_is_read_at_once_keeps_to_its_time(board: Board) -> None:
    for limit_s in (0.05, 0.1, 0.2):
        n_tokens = board.costs.tokens_within(limit_s, 1000, 32)
        assert n_tokens == 1 or machine(n_tokens, 1000) <= 1.1 * limit_s
        assert n_tokens == 32 or machine(n_tokens + 2, 1000) > 0.9 * limit_s


def test_the_unit_in_hand_says_when_it_will_have_ended(board: Board) -> None:
    began_s = board.clock()
    with board.costs.read(32, 80):
        assert board.costs.busy_until_s == pytest.approx(began_s + machine(32, 80), rel=0.1)
        board.clock.now_s += 5.0
    assert board.costs.busy_until_s == board.clock()


def test_what_was_learnt_outlives_a_restart(board: Board) -> None:
    board.step(0.04)
    other = Costs(ManualClock())
    other.unpack(board.costs.pack())
    assert other.known
    assert other.read_s(20, 500) == pytest.approx(machine(20, 500), rel=0.15)


@pytest.mark.parametrize(
    "kept",
    [{"read": [[1.0, 2.0]]}, {"step": [[1.0, 0.1, -3.0]]}, {"fork": [[1.0, 0.0]]}, {"read": [[1.0] * 4 + [1e300]]}],
)
def test_what_another_has_kept_is_refused_whole(kept: dict[str, list[list[float]]]) -> None:
    costs = Costs(ManualClock())
    with pytest.raises(ValueError, match="a sample"):
        costs.unpack({"image": [[1.0, 64.0, 0.5]], **kept})
    assert costs.image_s(64) == 0
