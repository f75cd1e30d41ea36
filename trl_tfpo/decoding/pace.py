# SPDX-License-Identifier: Apache-2.0

r"""
When to draft, and how many tokens: a model of costs and acceptance that learns as decoding goes on.

A *round* drafts $k \ge 0$ tokens, reads them in one forward pass of the patient (the *check*, over $k + 1$ positions),
and keeps the accepted ones and one more token. With acceptance $a_i$ of the i-th draft it gives

$$E_k = 1 + a_1 + a_1 a_2 + \dots + a_1 \cdots a_k$$

tokens. The $k$ with the most tokens per second is drafted; $k = 0$ is plain guided decoding. Nothing here changes
which tokens come out.

Units: seconds of the clock that is passed, which may be a simulated one.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median


MAX_DRAFT_TOKENS = 8
ALLOWANCE = 0.02  # of the time of plain decoding, for trying out whether drafts pay
SHADOW_ALLOWANCE = 0.01  # of it for guesses that are compared and not used
LIKELY, CERTAIN = 2.0, 2.6  # standard deviations: before a risk is taken, and before drafting stops for good
RARE = 1 / 16  # share of the drafts; a rarer kind of draft does not keep drafting alive
GUESSES = ("draft", "shadow")  # parts of a round in which the drafter works
NUM_TIMES = 15  # the cost is the median of so many measurements
NUM_ROUNDS_FRESH = 32  # after so many rounds with drafts a plain one is timed again


class Costs:
    """
    Seconds that the parts of a round take: medians of measurements, and guesses where there are none.

    Args:
        clock (callable):
            Returns seconds.
        is_free (`bool`, *optional*, defaults to `True`):
            Whether reading the clock costs nothing. Otherwise, as on a GPU, where it waits for the device, only some
            rounds are timed.
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

    def of(self, part: Hashable, default: float = 0.0) -> float:
        """Median of the measurements of a part."""
        return self.medians.get(part, default)

    def num_known(self, part: Hashable) -> int:
        return len(self.times.get(part, ()))

    def plain(self) -> float:
        """A step of plain guided decoding."""
        return self.checks.get(1, 0.0) + self.of("fresh")

    def check(self, num_positions: int, is_worst_case: bool = False) -> float:
        """
        A forward pass of the patient over some positions.

        Between two measured numbers it is interpolated. Beyond the largest it rises by a twentieth of a step for each
        position, or in the worst case by a whole step, as if they were read one by one.
        """
        if num_positions in self.checks:
            return self.checks[num_positions]
        below = max((n for n in self.checks if n < num_positions), default=1)
        above = min((n for n in self.checks if n > num_positions), default=None)
        low, num_more = self.checks.get(below, 0.0), num_positions - below
        if above is None:
            return low + num_more * self.checks.get(1, 0.0) * (1.0 if is_worst_case else 0.05)
        high = self.checks[above]
        return max(low, high) if is_worst_case else low + (high - low) * num_more / (above - below)


class Acceptance:
    """How often drafts of one kind are accepted. Recent ones count most, except for the upper bound."""

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

    def lower(self) -> float:
        return _wilson(self.num_accepted, self.num, -LIKELY)

    def upper(self) -> float:
        return _wilson(self.total_accepted, self.total, CERTAIN)


def _wilson(num_accepted: float, num: float, deviations: float) -> float:
    """Wilson's bound of a rate; the lower one where `deviations` is negative."""
    if num == 0:
        return float(deviations > 0)
    rate, square = num_accepted / num, deviations**2
    spread = deviations * math.sqrt(rate * (1 - rate) / num + square / (4 * num**2))
    return (rate + square / (2 * num) + spread) / (1 + square / num)


class Pace(ABC):
    """Decides at each round whether to draft, and how many tokens. It may learn from what the rounds report."""

    def begin_text(self) -> None:  # noqa: B027  # for paces that learn, as the next three
        """The next round reads a prompt."""

    def begin_round(self) -> None:  # noqa: B027
        """A round begins."""

    def end_round(self, num_checked: int, num_new_tokens: int) -> None:  # noqa: B027
        """A round with `num_checked` drafts has ended."""

    def observe(self, kind: Hashable, is_accepted: bool) -> None:  # noqa: B027
        """A draft, or a guess at a plain step, was or would have been accepted."""

    @contextmanager
    def timed(self, part: Hashable, num: int = 1) -> Iterator[None]:
        """A context for `num` repetitions of a part of the round."""
        yield

    def shadow_is_due(self) -> bool:
        """Whether to guess a token at this plain step, only to compare it."""
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
    2. *Acceptance* is counted for each kind of draft (how sure the drafter was). At plain steps some guesses are
       compared with the outcome, although nothing was drafted.
    3. *Account.* What rounds cost beyond plain steps for the same tokens is added up. A round is drafted only if its
       loss at the lower bound of acceptance and the highest likely cost keeps the account within 2% of the time of
       plain decoding. Gains are credited.
    4. *Stop.* When the upper bounds of acceptance say that no draft can pay, drafting and comparing stop for good.

    Args:
        costs ([`Costs`]):
            Measured costs; pairs that decode with other settings may share them.
        reads_doctors (`bool`, *optional*, defaults to `True`):
            Whether the doctors read a token when it is drafted. Otherwise they read it when it is checked.
        step_share (`float`, *optional*, defaults to 0):
            A guess at the time in which a model that only drafts reads a token or a prompt, as a share of the time of
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
        self.plain_seconds = self.extra_seconds = self.shadow_seconds = self.start_seconds = 0.0
        self.num_since_plain = self.num_rounds = 0
        self.is_stopped = self.is_first = False
        self.spent, self.has_guessed = 0.0, False

    # A round

    def begin_text(self) -> None:
        self.is_first = True

    def begin_round(self) -> None:
        self.num_rounds += 1
        self.spent, self.has_guessed = 0.0, False

    @contextmanager
    def timed(self, part: Hashable, num: int = 1) -> Iterator[None]:
        """Measure `num` repetitions of a part of the round, unless that costs time and the part is known."""
        is_guess = part in GUESSES
        self.has_guessed |= is_guess
        is_known = self.costs.num_known(part) >= NUM_TIMES // 4
        if not (self.is_first or self.costs.is_free or not is_known or self.num_rounds % 16 == 0):
            yield
            self.spent += num * self.costs.of(part, 0.0)
            return
        start = self.costs.clock()
        yield
        seconds = self.costs.clock() - start
        is_usual = not self.is_first and not (is_guess and self.start_seconds)
        if is_guess:
            self.start_seconds = 0.0
        if is_usual:
            self.costs.add(part, seconds / num)
        self.spent += num * self.costs.of(part, 0.0) if is_usual and is_known else seconds

    def end_round(self, num_checked: int, num_new_tokens: int) -> None:
        """Settle the account of a round with `num_checked` drafts."""
        if self.is_first:  # also part of plain decoding
            self.plain_seconds += self.spent
            self.start_seconds = self.step_share * self.spent
            self.is_first = False
            return
        plain = num_new_tokens * self.costs.plain()
        self.plain_seconds += plain
        if num_checked or self.has_guessed:
            self.extra_seconds += self.spent - plain
        if self.has_guessed and not num_checked:
            self.shadow_seconds += max(0.0, self.spent - plain)
        self.num_since_plain = self.num_since_plain + 1 if num_checked else 0

    # Acceptance

    def observe(self, kind: Hashable, is_accepted: bool) -> None:
        """Count a draft, or a guess at a plain step, that was or would have been accepted."""
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
        cost = self.start_seconds + self.costs.of("shadow", (self.step_share + 0.01) * self.costs.plain())
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
        """The number of drafts with most tokens per second, among those that the account permits. 0 is permitted."""
        num_made, plain = len(kinds), self.costs.plain()
        prior = self.all.mean(0.5)
        rounds = self._rounds(self._rates(kinds, lengths, lambda x: x.mean(prior), prior), num_made)
        lows = self._rates(kinds, lengths, Acceptance.lower, self.all.lower())
        worst = self._rounds(lows, num_made, is_worst_case=True)
        allowed = ALLOWANCE * self.plain_seconds - self.extra_seconds - self.start_seconds
        possible = [k for k in lengths if k and worst[k][1] - worst[k][0] * plain <= allowed]
        return max([0, *possible], key=lambda k: rounds[k][0] / rounds[k][1])

    def _rates(
        self, kinds: Sequence[Hashable], lengths: range, rate: Callable[[Acceptance], float], other: float
    ) -> list[float]:
        """Acceptance of drafts of these kinds, then of drafts whose kind is not known yet."""
        known = [rate(self.by_kind.get(kind) or Acceptance()) for kind in kinds]
        return known + [other] * (lengths[-1] - len(kinds))

    def _rounds(self, rates: Sequence[float], num_made: int, is_worst_case: bool = False) -> list[tuple[float, float]]:
        """
        Expected tokens and seconds of rounds that check 0, 1, ... drafts, where `num_made` have been drafted already.
        """
        plain, fresh = self.costs.plain(), self.costs.of("fresh")
        share = self.step_share * (2 if is_worst_case else 1)
        draft = self.costs.of("draft", share * plain + fresh * self.reads_doctors)
        read = self.costs.of("read", 0.0 if self.reads_doctors else fresh)
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
