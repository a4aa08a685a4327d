"""A GPU runs as many tasks at once as are measured to gain, and as its memory holds."""

import pytest

from capgap.sweep.sharing import MEASURE_SECONDS, SETTLE_SECONDS, Sharing


class Card:
    """Pretended: tasks alone take the `share` of it that they can use, all together no more than
    the whole. It has a task begin wherever there is room."""

    def __init__(self, most=8, memory=100.0, needs=10):
        self.now = 0.0
        self.sharing = Sharing(most, memory, clock=lambda: self.now)
        self.needs = needs
        self.done: dict[str, float] = {}
        self.said: list[str] = []

    def run(self, share, seconds, until=float("inf")):
        """`share` of each task; each ends after `until` tokens."""
        end = self.now + seconds
        while self.now < end:
            while self.sharing.has_room(self.needs):
                name = f"task-{len(self.done)}"
                self.done[name] = 0.0
                self.sharing.begin(name, self.needs)
            running = list(self.sharing.running)
            each = min(share, 1 / len(running)) * 100
            self.now += 1
            for name in running:
                self.done[name] += each
                said = self.sharing.step(name, int(self.done[name]))
                self.said += [said] if said else []
                if self.done[name] >= until:
                    self.sharing.end(name)


ONCE = SETTLE_SECONDS + MEASURE_SECONDS + 2


@pytest.mark.parametrize(
    ("share", "number"),
    [(1.0, 1), (0.95, 1), (0.5, 2), (0.4, 3), (0.01, 8)],
)
def test_tasks_are_added_as_long_as_they_gain(share, number):
    card = Card()
    card.run(share, 20 * ONCE)
    assert (card.sharing.kept, card.sharing.allowed) == (number, number)
    assert len(card.sharing.running) in (number, number + 1)  # the last one tried goes on
    assert card.sharing.is_settled
    if share == 0.4:
        assert card.said == [
            "2 tasks at once do 2.00 times the work of 1: 2 from here on",
            "3 tasks at once do 1.25 times the work of 2: 3 from here on",
            "4 tasks at once do 1.00 times the work of 3: 3 from here on",
        ]


def test_smaller_tasks_that_come_later_are_measured_anew():
    card = Card()
    card.run(1.0, 5 * ONCE, until=10_000)
    assert (card.sharing.kept, len(set(card.said))) == (1, 1)
    card.run(0.5, 20 * ONCE, until=10_000)
    assert (card.sharing.kept, card.sharing.allowed) == (2, 2)


def test_tasks_that_end_too_soon_decide_nothing():
    card = Card()
    # the second: long enough to be measured alone, and over before it is beside another
    for seconds in (ONCE - 5, ONCE + 5):
        card.run(0.5, 50 * ONCE, until=50 * seconds)
        assert (card.sharing.kept, card.said) == (1, [])
    assert card.sharing.allowed == 2


def test_memory_bounds_what_runs_at_once():
    card = Card(memory=29)
    card.run(0.01, 20 * ONCE)
    assert len(card.sharing.running) == 2
    # whatever it needs, where it is alone
    assert Sharing(8, 5).has_room(10)
    # a task that found none beside others: as many as there are then
    card.sharing.end("task-1")
    assert card.sharing.lacked_memory()
    assert (card.sharing.kept, card.sharing.allowed, card.sharing.is_settled) == (1, 1, True)
    card.sharing.end("task-0")
    assert not card.sharing.lacked_memory()


def test_a_chain_that_begins_to_count_anew_is_no_change_of_speed():
    card = Card()
    card.run(0.5, SETTLE_SECONDS + 10)
    card.done["task-0"] = 0.0
    card.run(0.5, MEASURE_SECONDS)
    assert card.sharing.rates == {}
    card.run(0.5, ONCE)
    assert card.sharing.rates[1]["task-0"] == pytest.approx(50, rel=0.05)
