# SPDX-License-Identifier: Apache-2.0

r"""
Number of tokens to draft, from costs and acceptance that are measured during decoding.

A *round* drafts $k \ge 0$ tokens, reads them in one forward pass of the patient (the *check*, over $k + 1$ positions),
and keeps the accepted ones and one more token. If the i-th draft is accepted with probability $a_i$, the expected
number of tokens is

$$E_k = 1 + a_1 + a_1 a_2 + \dots + a_1 \cdots a_k$$

The $k$ with the most tokens per second is chosen; $k = 0$ is plain guided decoding. The choice does not change the
text.

Units: seconds of the given clock, which may be simulated.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median


MAX_DRAFT_TOKENS = 8
ALLOWANCE = 0.025  # share of the time of plain decoding that drafting may lose
MAX_CREDIT = 4  # steps of plain decoding
SHADOW_ALLOWANCE = 0.005  # share of the time of plain decoding for guesses that are only compared
CERTAIN = 2.6  # standard deviations of the bound that decides the end of drafting
RARE = 1 / 16  # share of the drafts; kinds below it do not count in the decision to end drafting
GUESSES = ("draft", "shadow")  # parts of a round in which the drafter works
FEW = 3  # number of measurements from which on the median is the cost
NUM_TIMES = 15  # number of measurements whose median is the cost
NUM_ROUNDS_FRESH = 32  # number of rounds with drafts after which a plain one is timed again


class Costs:
    """
    Seconds that the parts of a round take: medians of measurements, and estimates where there are none.

    The first measurements of a part may include work that is done once. With fewer than [`FEW`] measurements, the cost
    is therefore the smaller of median and estimate, and in the worst case the larger.

    Args:
        clock (callable):
            Returns seconds.
        is_free (`bool`, *optional*, defaults to `True`):
            Whether reading the clock takes no time. On a GPU it waits for the device; then only some rounds are timed.
    """

    def __init__(self, clock: Callable[[], float], is_free: bool = True):
        self.clock, self.is_free = clock, is_free
        self.times: dict[Hashable, deque[float]] = {}
        self.medians: dict[Hashable, float] = {}
        self.checks: dict[int, float] = {}  # medians by number of positions

    def add(self, part: Hashable, seconds: float) -> None:
        times = self.times.setdefault(part, deque(maxlen=NUM_TIMES))
        times.append(seconds)
        self.medians[part] = median(times)
        if isinstance(part, tuple):
            self.checks[part[1]] = self.medians[part]

    def of(self, part: Hashable, estimate: float | None = None, is_worst_case: bool = False) -> float:
        """Cost of a part. Without an estimate it is the median, or 0."""
        known = self.medians.get(part)
        if known is None:
            return estimate or 0.0
        if estimate is None or self.num_known(part) >= FEW:
            return known
        return max(known, estimate) if is_worst_case else min(known, estimate)

    def num_known(self, part: Hashable) -> int:
        return len(self.times.get(part, ()))

    def plain(self) -> float:
        """Cost of a step of plain guided decoding."""
        return self.checks.get(1, 0.0) + self.of("fresh")

    def check(self, num_positions: int, is_worst_case: bool = False) -> float:
        """
        Cost of a forward pass of the patient over some positions.

        Between two measured numbers of positions the estimate is interpolated; the worst case is the larger of the
        two. Beyond the largest number, each position adds a twentieth of a step, and in the worst case a whole step.
        """
        if num_positions == 1:
            return self.checks.get(1, 0.0)
        return self.of(("check", num_positions), self._estimated_check(num_positions, is_worst_case), is_worst_case)

    def _estimated_check(self, num_positions: int, is_worst_case: bool) -> float:
        below = max((n for n in self.checks if n < num_positions), default=1)
        above = min((n for n in self.checks if n > num_positions), default=None)
        low, num_more = self.checks.get(below, 0.0), num_positions - below
        if above is None:
            return low + num_more * self.checks.get(1, 0.0) * (1.0 if is_worst_case else 0.05)
        high = self.checks[above]
        return max(low, high) if is_worst_case else low + (high - low) * num_more / (above - below)


class Acceptance:
    """Rate of acceptance of one kind of draft. Recent drafts count most, except for the upper bound."""

    def __init__(self) -> None:
        self.num_accepted = self.num = 0.0  # recent
        self.total_accepted = self.total = 0

    def add(self, is_accepted: bool) -> None:
        self.num_accepted = 0.98 * self.num_accepted + is_accepted
        self.num = 0.98 * self.num + 1
        self.total_accepted += is_accepted
        self.total += 1

    def mean(self, prior: float) -> float:
        return (self.num_accepted + 2 * prior) / (self.num + 2)

    def upper(self) -> float:
        """Wilson's upper bound."""
        if self.total == 0:
            return 1.0
        num, rate, square = self.total, self.total_accepted / self.total, CERTAIN**2
        spread = CERTAIN * math.sqrt(rate * (1 - rate) / num + square / (4 * num**2))
        return (rate + square / (2 * num) + spread) / (1 + square / num)


class Pace(ABC):
    """Decides in each round how many tokens to draft, possibly from reports of earlier rounds."""

    def begin_text(self) -> None:  # noqa: B027  # this and the next three are for paces that learn
        """The next round reads a prompt."""

    def begin_round(self) -> None:  # noqa: B027
        """A round begins."""

    def end_round(self, num_checked: int, num_new_tokens: int) -> None:  # noqa: B027
        """A round with `num_checked` drafts has ended."""

    def observe(self, kind: Hashable, is_accepted: bool) -> None:  # noqa: B027
        """Record whether a draft was accepted, or a guess at a plain step would have been."""

    @contextmanager
    def timed(self, part: Hashable, num: int = 1) -> Iterator[None]:
        """A context for `num` repetitions of a part of the round."""
        yield

    def shadow_is_due(self) -> bool:
        """Whether to guess the token of this plain step, for a comparison only."""
        return False

    @abstractmethod
    def wants_more(self, kinds: Sequence[Hashable], max_tokens: int) -> bool:
        """Whether to draft one more token, after tokens of these kinds."""

    @abstractmethod
    def num_to_check(self, kinds: Sequence[Hashable]) -> int:
        """How many of the drafted tokens the patient should read."""


class FixedLength(Pace):
    """Always drafts the same number of tokens."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def wants_more(self, kinds: Sequence[Hashable], max_tokens: int) -> bool:
        return len(kinds) < min(max_tokens, self.num_tokens)

    def num_to_check(self, kinds: Sequence[Hashable]) -> int:
        return len(kinds)


class MeasuredPace(Pace):
    """
    Drafts where it saves time, and keeps the total time near or below that of plain decoding.

    1. *Costs* of a draft, of a plain step and of a check are measured as they occur. A check of more positions than
       any so far is tried only where it may pay.
    2. *Acceptance* is counted for each kind of draft. At some plain steps the drafter also guesses the token, and the
       guess is compared with the outcome.
    3. *Credit.* Each round adds to it 2.5% of the time that plain decoding takes for the same tokens, plus the time
       that the round saved or minus the time that it lost. A round drafts only if the credit would cover the loss if
       all drafts were rejected, at the highest likely cost. The credit is at most four plain steps, so that earlier
       savings cannot pay for many rejected drafts in a later text.
    4. *Stop.* If no draft can save time even at the upper bounds of acceptance, drafting and comparing end for these
       models and settings.

    Args:
        costs ([`Costs`]):
            Measured costs.
        reads_doctors (`bool`, *optional*, defaults to `True`):
            Whether the doctors read a token when it is drafted. Otherwise they read it when it is checked.
        step_share (`float`, *optional*, defaults to 0):
            Estimated time in which a separate drafting model reads a token or a prompt, as a share of the time of
            plain decoding.
        max_tokens (`int`, *optional*, defaults to 8):
            Largest number of drafted tokens.
    """

    def __init__(
        self,
        costs: Costs,
        reads_doctors: bool = True,
        step_share: float = 0.0,
        max_tokens: int = MAX_DRAFT_TOKENS,
    ):
        self.costs, self.reads_doctors, self.max_tokens = costs, reads_doctors, max_tokens
        self.step_share = step_share
        self.all, self.by_kind = Acceptance(), dict[Hashable, Acceptance]()
        self.credit = self.plain_seconds = self.shadow_seconds = self.prompt_seconds = 0.0
        self.num_since_plain = self.num_rounds = 0
        self.is_stopped = self.is_first = self.is_behind = False
        self.spent, self.has_guessed = 0.0, False

    # A round

    def begin_text(self) -> None:
        self.is_first = True

    def begin_round(self) -> None:
        self.num_rounds += 1
        self.spent, self.has_guessed = 0.0, False

    @contextmanager
    def timed(self, part: Hashable, num: int = 1) -> Iterator[None]:
        """Time `num` repetitions of a part. If the clock takes time, known parts are timed only in some rounds."""
        if part in GUESSES:
            part = "catch up" if self.is_behind else part
            self.has_guessed, self.is_behind = True, False
        is_known = self.costs.num_known(part) >= FEW
        if not (self.is_first or self.costs.is_free or not is_known or self.num_rounds % 16 == 0):
            yield
            self.spent += num * self.costs.of(part)
            return
        start = self.costs.clock()
        yield
        seconds = self.costs.clock() - start
        if not self.is_first:
            self.costs.add(part, seconds / num)
        self.spent += num * self.costs.of(part) if is_known and not self.is_first else seconds

    def end_round(self, num_checked: int, num_new_tokens: int) -> None:
        """Update the credit after a round with `num_checked` drafts."""
        self.is_behind = self.step_share > 0 and not self.has_guessed
        if self.is_first:  # also part of plain decoding
            self._settle(self.spent, 0.0)
            self.prompt_seconds, self.is_first = self.spent, False
            return
        plain = num_new_tokens * self.costs.plain()
        self._settle(plain, self.spent - plain if num_checked or self.has_guessed else 0.0)
        if self.has_guessed and not num_checked:
            self.shadow_seconds += max(0.0, self.spent - plain)
        self.num_since_plain = self.num_since_plain + 1 if num_checked else 0

    def _settle(self, plain: float, extra: float) -> None:
        """Add the allowance for `plain` seconds to the credit, and subtract `extra` seconds."""
        self.plain_seconds += plain
        self.credit = min(self.credit + ALLOWANCE * plain - extra, MAX_CREDIT * (self.costs.plain() or math.inf))

    # Acceptance

    def observe(self, kind: Hashable, is_accepted: bool) -> None:
        """Count a draft or a guess, and stop drafting if it can no longer save time."""
        self.all.add(is_accepted)
        self.by_kind.setdefault(kind, Acceptance()).add(is_accepted)
        if self.all.total >= 32 and self.all.total % 8 == 0 and not self._can_pay():
            self.is_stopped = True

    def _can_pay(self) -> bool:
        highest = max(x.upper() for x in self.by_kind.values() if x.total >= RARE * self.all.total)
        rounds = self._rounds([highest] * self.max_tokens, 0)
        return any(num_tokens * self.costs.plain() > seconds for num_tokens, seconds in rounds[1:])

    def shadow_is_due(self) -> bool:
        if self.is_stopped or self.is_first:
            return False
        cost = self._catch_up() + self.costs.of("shadow", (self.step_share + 0.01) * self.costs.plain())
        return self.shadow_seconds + cost <= SHADOW_ALLOWANCE * self.plain_seconds

    # Decisions

    def wants_more(self, kinds: Sequence[Hashable], max_tokens: int) -> bool:
        if self.is_stopped or self.is_first or self.num_since_plain >= NUM_ROUNDS_FRESH or not self.costs.plain():
            return False
        max_tokens = min(max_tokens, self.max_tokens)
        return len(kinds) < max_tokens and self._best(kinds, range(len(kinds), max_tokens + 1)) > len(kinds)

    def num_to_check(self, kinds: Sequence[Hashable]) -> int:
        return self._best(kinds, range(len(kinds) + 1)) if kinds else 0

    def _best(self, kinds: Sequence[Hashable], lengths: range) -> int:
        """The number of drafts with the most tokens per second that the credit covers. 0 is always possible."""
        num_made, plain = len(kinds), self.costs.plain()
        prior = self.all.mean(0.5)
        known = [self.by_kind.get(kind, Acceptance()).mean(prior) for kind in kinds]
        num_unknown = lengths[-1] - num_made
        rounds = self._rounds(known + [prior] * num_unknown, num_made)
        worst = self._rounds([0.0] * lengths[-1], num_made, is_worst_case=True)
        credit = self.credit - self._catch_up()
        possible = [k for k in lengths if k and worst[k][1] - worst[k][0] * plain <= credit]
        return max([0, *possible], key=lambda k: rounds[k][0] / rounds[k][1])

    def _catch_up(self) -> float:
        """Worst-case time in which the drafting model reads the tokens since its last guess. 0 if it has read them."""
        if not self.is_behind:
            return 0.0
        return self.costs.of("catch up", self.step_share * self.prompt_seconds, is_worst_case=True)

    def _rounds(self, rates: Sequence[float], num_made: int, is_worst_case: bool = False) -> list[tuple[float, float]]:
        """
        Expected tokens and seconds of rounds that check 0, 1, ... drafts, where `num_made` have been drafted already.
        """
        plain, fresh = self.costs.plain(), self.costs.of("fresh")
        share = self.step_share * (2 if is_worst_case else 1)
        draft = self.costs.of("draft", share * plain + fresh * self.reads_doctors, is_worst_case)
        read = self.costs.of("read", 0.0 if self.reads_doctors else fresh, is_worst_case)
        rounds, num_tokens, reading, reached = [], 1.0, 0.0, 1.0
        for num_drafts, rate in enumerate([1.0, *rates]):
            if num_drafts:
                reading += reached * read
                reached *= rate
                num_tokens += reached
            last = read if num_made > num_drafts else fresh
            seconds = self.costs.check(num_drafts + 1, is_worst_case) + draft * max(num_drafts, num_made)
            rounds.append((num_tokens, seconds + reading + reached * last))
        return rounds
