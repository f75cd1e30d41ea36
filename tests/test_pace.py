# SPDX-License-Identifier: Apache-2.0

"""The pace of speculation on simulated machines: it finds what pays, and what does not costs next to nothing."""

import random
from statistics import mean

import pytest

from trl_tfpo.decoding.pace import CERTAIN, Acceptance, Costs, MeasuredPace


CHECKS = {  # seconds of a check, by positions; a step of the patient takes 1
    "free": lambda num: 1.0,
    "cheap": lambda num: 1 + 0.07 * (num - 1),
    "AVX2, float32": lambda num: (1.0, 1.6, 1.9, 1.59, 1.9, 1.91, 2.17, 2.2, 2.2)[num - 1],
    "as dear as steps": lambda num: 1.0 * num,
}


class Simulation:
    """Decodes texts whose drafts are accepted with a given rate, and counts seconds."""

    def __init__(self, check, rate, *, doctor=0.15, assistant=None, seed=0, is_free=True, warm_up=0.0):
        self.seconds, self.random, self.check, self.rate = 0.0, random.Random(seed), check, rate
        self.doctor, self.assistant = doctor, assistant  # seconds; without an assistant the doctor drafts
        self.num_readings, self.warm_up, self.seen = 0, warm_up, set()
        share = 0.0 if assistant is None else assistant
        self.pace = MeasuredPace(Costs(self.clock, is_free), step_share=share)
        self.plain = 0.0

    def first(self, part) -> float:
        """Additional seconds of the first check of a length, and of the first draft."""
        is_first = part not in self.seen
        self.seen.add(part)
        return self.warm_up * is_first

    def clock(self):
        self.num_readings += 1
        return self.seconds

    def catch_up(self, length: int) -> float:
        """Seconds in which the assistant reads the tokens that it has not read yet."""
        num_new, self.num_read = length - self.num_read, length
        return (self.assistant or 0.0) * (1 + 0.2 * (num_new - 1))

    def text(self, num_tokens: int, prompt: float = 1.0) -> float:
        """Decode a text. Returns its time over that of plain guided decoding."""
        before, pace, length = self.seconds, self.pace, 0
        self.num_read = -10  # by the assistant, of the text; the prompt has 10 tokens
        draft = self.doctor + 0.01
        pace.begin_text()
        while length < num_tokens:
            pace.begin_round()
            accepted = []
            while pace.wants_more([0] * len(accepted), num_tokens - length - 1):
                with pace.timed("draft"):
                    self.seconds += draft + self.catch_up(length + len(accepted)) + self.first("draft")
                accepted.append(self.random.random() < self.rate)
            num_checked = pace.num_to_check([0] * len(accepted))
            with pace.timed(("check", num_checked + 1)):
                self.seconds += prompt if length == 0 else self.check(num_checked + 1) + self.first(num_checked)
            num_new = 0
            for index in range(num_checked + 1):
                is_read = index < len(accepted)
                with pace.timed("read" if is_read else "fresh"):
                    self.seconds += 0.01 if is_read else 0.01 + self.doctor
                num_new += 1
                if is_read:
                    pace.observe(0, accepted[index])
                elif not accepted and pace.shadow_is_due():
                    with pace.timed("shadow"):
                        self.seconds += 0.01 + self.catch_up(length + num_new - 1)
                    pace.observe(0, self.random.random() < self.rate)
                if not is_read or not accepted[index]:
                    break
            length += num_new
            pace.end_round(num_checked, num_new)
        plain = prompt + (num_tokens - 1) * self.check(1) + num_tokens * (0.01 + self.doctor)
        self.plain += plain
        return (self.seconds - before) / plain


RATES = (0.0, 0.2, 0.5, 0.8, 1.0)


@pytest.mark.parametrize("checks", CHECKS)
@pytest.mark.parametrize("costs", [dict(), dict(doctor=0.4), dict(assistant=0.1)], ids=str)
@pytest.mark.parametrize("num_tokens", [24, 80])
def test_it_never_costs_more_than_3_percent(checks, costs, num_tokens):
    """At any rate of acceptance, from the first text on."""
    for rate in RATES:
        first, all_texts = [], []
        for seed in range(4):
            machine = Simulation(CHECKS[checks], rate, seed=seed, **costs)
            first.append(machine.text(num_tokens))
            machine.text(num_tokens)
            all_texts.append(machine.seconds / machine.plain)
        assert max(first + all_texts) <= 1.03, rate


@pytest.mark.parametrize("is_free", [True, False])
def test_an_agreeing_pair_gains_where_checks_are_cheap(is_free):
    """At most 0.67 of the unguided patient where a check of 5 positions costs less than 1.3 steps."""
    check = CHECKS["cheap"]
    assert check(5) < 1.3
    machine = Simulation(check, 0.85, seed=1, is_free=is_free)
    machine.text(200)
    ratio = machine.text(200)
    assert ratio * (1 + machine.doctor + 0.01) <= 0.67
    assert ratio <= 1.15 * best_ratio(check, 0.85, machine.doctor)
    if not is_free:  # a clock that waits for the device is read in few rounds
        assert machine.num_readings < 400


def best_ratio(check, rate, doctor):
    """Of the best fixed number of drafts, over plain decoding."""

    def per_token(num):
        tokens = [rate**i for i in range(num + 1)]
        seconds = check(num + 1) + num * (doctor + 0.01) + 0.01 * sum(tokens[:-1]) + tokens[-1] * (0.01 + doctor)
        return seconds / sum(tokens)

    return min(map(per_token, range(9))) / per_token(0)


def test_it_finds_the_best_length_on_a_processor_with_steps_in_its_costs():
    """The length that pays depends on the processor."""
    machine = Simulation(CHECKS["AVX2, float32"], 0.9)
    machine.text(300)
    assert machine.text(300) <= 1.12 * best_ratio(machine.check, 0.9, machine.doctor) < 0.7


def test_it_stops_for_good_where_drafts_cannot_pay():
    """Also guesses that are only compared end."""
    machine = Simulation(CHECKS["as dear as steps"], 0.02)
    for _ in range(6):
        machine.text(100)
    assert machine.pace.is_stopped
    assert machine.text(100) == pytest.approx(1.0)


def test_it_notices_that_a_pair_no_longer_agrees():
    """What was gained before is not lost again: a text loses at most 2.5% and four steps."""
    machine = Simulation(CHECKS["cheap"], 0.9)
    machine.text(300)
    machine.rate = 0.02
    assert machine.text(300) <= 1.025 + 4 / 300
    assert machine.text(300) <= 1.03


def test_a_check_costs_what_was_measured():
    """Between measurements it is interpolated, beyond them guessed; outliers do not count."""
    costs = Costs(lambda: 0.0)
    for seconds in (1.0, 1.0, 9.0):
        costs.add(("check", 1), seconds)
    costs.add(("check", 5), 9.0)  # the first measurement may include work that is done once
    assert (costs.check(5), costs.check(5, is_worst_case=True)) == (1.2, 9.0)
    for _ in range(2):
        costs.add(("check", 5), 2.0)
    assert [costs.check(n) for n in (1, 3, 5, 7)] == [1.0, 1.5, 2.0, 2.1]
    assert [costs.check(n, is_worst_case=True) for n in (1, 3, 5, 7)] == [1.0, 2.0, 2.0, 4.0]


def test_bounds_of_acceptance():
    """Wilson's upper bound: 0 of 5 does not exclude a rate of a half, and without drafts any rate is possible."""
    acceptance = Acceptance()
    assert acceptance.upper() == 1.0
    for _ in range(5):
        acceptance.add(False)
    assert acceptance.upper() == pytest.approx(CERTAIN**2 / (5 + CERTAIN**2))


def test_an_assistant_that_agrees_gains_in_short_texts():
    """Its first drafts are slow: it reads many tokens before each, and libraries prepare for new shapes."""
    ratios = []
    for seed in range(8):
        machine = Simulation(CHECKS["AVX2, float32"], 0.9, doctor=0.08, assistant=0.08, seed=seed, warm_up=1.0)
        ratios += [machine.text(30) for _ in range(12)][8:]
    assert mean(ratios) <= 0.85
