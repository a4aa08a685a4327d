"""A GPU runs as many tasks at once as are measured to gain, and as its memory holds."""

import pytest

from capgap.sweep.sharing import MEASURE_SECONDS, SETTLE_SECONDS, Sharing


class Card:
    """Pretended: tasks alone take the `share` of it that they can use, all together no more than
    the whole, once they have loaded for so many seconds. It has a task begin wherever there is
    room."""

    def __init__(self, most=8, memory=100.0, needs=10, loading=0):
        self.now = 0.0
        self.sharing = Sharing(most, memory, clock=lambda: self.now)
        self.needs, self.loading = needs, loading
        self.begun: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.said: list[str] = []

    def run(self, share, seconds, until=float("inf")):
        """`share` of each task; each ends after `until` tokens."""
        end = self.now + seconds
        while self.now < end:
            while self.sharing.has_room(self.needs):
                name = f"task-{len(self.done)}"
                self.done[name], self.begun[name] = 0.0, self.now
                self.sharing.begin(name, self.needs)
            self.now += 1
            running = [
                name for name in self.sharing.running if self.now - self.begun[name] > self.loading
            ]
            each = min(share, 1 / max(1, len(running))) * 100
            for name in running:
                self.done[name] += each
                said = self.sharing.step(name, int(self.done[name]))
                self.said += [said] if said else []
                if self.done[name] >= until:
                    self.sharing.end(name)


ONCE = SETTLE_SECONDS + MEASURE_SECONDS + 2


@pytest.mark.parametrize("loading", [0, 60])
@pytest.mark.parametrize(
    ("share", "number"),
    [(1.0, 1), (0.95, 1), (0.5, 2), (0.4, 3), (0.01, 8)],
)
def test_tasks_are_added_as_long_as_they_gain(share, number, loading):
    card = Card(loading=loading)
    card.run(share, 20 * (ONCE + loading))
    assert (card.sharing.kept, card.sharing.allowed) == (number, number)
    assert len(card.sharing.running) in (number, number + 1)  # the last one tried goes on
    assert card.sharing.is_settled
    if share == 0.4:
        assert card.said == [
            "2 tasks at once do 2.00 times the work of 1: 2 from here on",
            "3 tasks at once do 1.25 times the work of 2: 3 from here on",
            "4 tasks at once do 1.00 times the work of 3: 3 from here on",
        ]


def test_what_others_gained_is_measured_anew():
    """Tasks that come later may be smaller, or larger: what is kept rises and falls."""
    card = Card()
    for share, number in ((1.0, 1), (0.5, 2), (0.2, 5), (1.0, 1)):
        card.run(share, 60 * ONCE, until=10_000)
        assert card.said[-1].endswith(f": {number} from here on")
    # of those that are over before they are measured as many begin as of the last ones
    card = Card()
    card.run(0.5, 20 * ONCE, until=10_000)
    card.run(0.5, 20 * ONCE, until=50 * (SETTLE_SECONDS - 5))
    assert (card.sharing.kept, card.sharing.allowed, len(card.sharing.running)) == (2, 2, 2)


def test_tasks_that_end_too_soon_decide_nothing():
    card = Card()
    # the second: long enough to be measured alone, and over before it is beside another
    for seconds in (ONCE - 5, ONCE + 5):
        card.run(0.5, 50 * ONCE, until=50 * seconds)
        assert (card.sharing.kept, card.said) == (1, [])


def test_memory_bounds_what_runs_at_once():
    card = Card(memory=29)
    card.run(0.01, 20 * ONCE)
    assert len(card.sharing.running) == 2
    assert all(map(card.sharing.was_shared, card.sharing.running))
    # whatever it needs, where it is alone; nothing comes beside what needs all
    empty = Sharing(most=8, memory=5, kept=2)
    assert empty.has_room(10)
    empty.begin("large", float("inf"))
    assert not empty.has_room(0)
    assert not empty.was_shared("large")


def test_a_number_that_was_asked_for_stays():
    sharing = Sharing(most=3, kept=3, is_settled=True)
    for number in range(9):
        assert sharing.has_room(1e12)
        sharing.begin(f"task-{number}", 1e12)
        if number >= 2:
            assert not sharing.has_room(0)
            sharing.end(f"task-{number - 2}")


def test_a_chain_that_begins_to_count_anew_is_no_change_of_speed():
    card = Card()
    card.run(0.5, SETTLE_SECONDS + 10)
    card.done["task-0"] = 0.0
    card.run(0.5, MEASURE_SECONDS)
    assert card.sharing.rates == {}
    card.run(0.5, ONCE)
    assert card.sharing.rates[1]["task-0"] == pytest.approx(50, rel=0.05)
