# SPDX-License-Identifier: Apache-2.0

"""Laws, hand-worked numbers, float64 oracles and finite differences for every equation."""

import math

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_tfpo import functional
from trl_tfpo.functional import (
    FactoredLogits,
    first_divergence,
    flow_potential,
    guided_logps,
    log_prefix_scores,
    next_token_entropy,
    plausible_mask,
    subtb_loss,
    terminal_boundary,
    token_importance,
    token_logps,
    token_rewards,
    value_discrimination_loss,
)


LAMBDAS = [0.0, 0.3, 0.9, 0.999, 1.0]
MASK = torch.tensor(  # an awkward shape: a full row, a row of one token, a row with tokens deleted
    [[1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0]], dtype=torch.bool
)
STATE_MASK = torch.cat([torch.ones(3, 1, dtype=torch.bool), MASK], dim=1)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept(values, mask):
    return [row[keep].tolist() for row, keep in zip(values, mask, strict=True)]


class TestTokenRewards:
    def test_by_hand(self):
        """Gaps 0, 2, -2, 0 have a mean size of 1, and importance tanh(2 / 1.05 / 3)."""
        positive, negative = torch.tensor([[0.0, -1.0, -3.0, -1.0]]), torch.tensor([[0.0, -3.0, -1.0, -1.0]])
        common = dict(
            positive_logps=positive,
            negative_logps=negative,
            preference_sign=torch.tensor([1]),
            completion_mask=torch.ones(1, 4, dtype=torch.bool),
        )
        t = math.tanh(2 / 1.05 / 3)
        for direction, weight, expected in [
            ("label", 0.5, [0, t, t, 0]),
            ("faces", 0.5, [0, t, -t, 0]),
            ("agreement", 0.5, [0, t, -t / 2, 0]),
            ("agreement", 0.0, [0, t, 0, 0]),
            ("agreement", 1.0, [0, t, -t, 0]),
        ]:
            found = token_rewards(**common, reward_direction=direction, disagreement_weight=weight)
            torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("direction", ["label", "agreement", "faces"])
    @pytest.mark.parametrize("temperature, threshold", [(1.0, 0.3), (0.5, 0.0), (2.0, 0.6)])
    def test_matches_the_oracle(self, direction, temperature, threshold):
        """Vectorised rewards that differ from the formula train the doctor on something else."""
        gap, sign = draw(3, 7), torch.tensor([1, -1, 1])
        found = token_rewards(
            positive_logps=gap.where(MASK, float("nan")),
            negative_logps=torch.zeros(3, 7, dtype=torch.float64),
            preference_sign=sign,
            completion_mask=MASK,
            reward_direction=direction,
            importance_temperature=temperature,
            sparsity_threshold=threshold,
        )
        expected = [
            oracles.rewards(gaps, label, direction, temperature, threshold)
            for gaps, label in zip(kept(gap, MASK), sign.tolist(), strict=True)
        ]
        for row, wanted in zip(kept(found, MASK), expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-12)
        assert (found[~MASK] == 0).all()

    def test_equal_faces_give_no_reward(self):
        """Division by a mean gap of zero would turn silence into NaN rewards."""
        zeros = torch.zeros(3, 7)
        found = token_rewards(
            positive_logps=zeros, negative_logps=zeros, preference_sign=torch.ones(3), completion_mask=MASK
        )
        assert (found == 0).all()

    def test_noise_where_the_faces_agree_is_no_signal(self):
        """Relative to almost nothing every gap is large: texts that say nothing would get the most rewards."""
        gap = torch.tensor([[0.004, -0.016, 0.002, 0.006], [0.004, -1.5, 0.002, 1.2]])
        mask, settings = torch.ones(2, 4, dtype=torch.bool), dict(preference_sign=torch.ones(2))
        rewards = [
            token_rewards(
                positive_logps=gap,
                negative_logps=torch.zeros(2, 4),
                completion_mask=mask,
                reward_direction="faces",
                gap_floor=floor,
                **settings,
            )
            for floor in (1e-6, 0.05)
        ]
        assert rewards[0][0].abs().sum() > 0.5 and rewards[1][0].abs().sum() == 0
        assert rewards[1][1].sign().tolist() == [0, -1, 0, 1]

    def test_importance_ignores_the_scale_of_the_gaps(self):
        """Importance is relative to the completion; a patient with sharper faces must not get denser rewards."""
        gap = draw(3, 7)
        torch.testing.assert_close(
            token_importance(gap=gap, completion_mask=MASK, gap_floor=1e-12),
            token_importance(gap=10 * gap, completion_mask=MASK, gap_floor=1e-12),
        )


class TestFlow:
    @pytest.mark.parametrize("temperature, weight", [(1.0, 0.0), (0.25, 1.0), (2.0, 0.5)])
    def test_potential_matches_the_oracle(self, temperature, weight):
        """A potential off by one state compares each flow with the wrong prefix."""
        rewards, policy, reference, values = draw(3, 7), draw(3, 7, seed=1), draw(3, 7, seed=2), draw(3, 8, seed=3)
        scores = log_prefix_scores(
            token_rewards=rewards,
            completion_mask=MASK,
            reference_logps=reference,
            reward_temperature=temperature,
            reference_weight=weight,
        )
        found = flow_potential(log_values=values, log_prefix_scores=scores, policy_logps=policy, completion_mask=MASK)
        for row, *arguments in zip(
            kept(found, STATE_MASK),
            kept(rewards, MASK),
            kept(policy, MASK),
            kept(values, STATE_MASK),
            kept(reference, MASK),
            strict=True,
        ):
            assert row == pytest.approx(oracles.potential(*arguments, temperature, weight), abs=1e-12)

    def test_reference_is_required_when_it_weighs(self):
        """Without the reference the doctor would become a pure reward distribution, unasked."""
        with pytest.raises(ValueError, match="reference_logps"):
            log_prefix_scores(token_rewards=draw(3, 7), completion_mask=MASK, reference_weight=1.0)

    @pytest.mark.parametrize(
        "setting", [{"reward_temperature": 0.0}, {"reward_temperature": -0.25}, {"reference_weight": -1.0}]
    )
    def test_settings_out_of_range(self, setting):
        """A negative temperature would train the doctor to prefer what was rejected."""
        with pytest.raises(ValueError, match="must be"):
            log_prefix_scores(token_rewards=draw(3, 7), completion_mask=MASK, **setting)

    def test_boundary_only_at_the_end_of_complete_rows(self):
        """A boundary on a truncated text teaches that nothing can follow a cut; none at all teaches nothing."""
        values = torch.full((2, 5), 3.0)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
        found = terminal_boundary(log_values=values, completion_mask=mask, is_complete=torch.tensor([True, False]))
        assert found.tolist() == [[3.0, 3.0, 0.0, 0.0, 0.0], [3.0] * 5]

    def test_without_the_boundary_any_policy_balances(self):
        """The degenerate solution: log V = sum log pi - log Q is free, zero loss, and ignores every reward."""
        rewards, policy = draw(3, 7), -draw(3, 7, seed=1).abs()
        scores = log_prefix_scores(token_rewards=rewards, completion_mask=MASK)
        free = flow_potential(
            log_values=torch.zeros(3, 8, dtype=torch.float64),
            log_prefix_scores=scores,
            policy_logps=policy,
            completion_mask=MASK,
        )
        degenerate = -free
        for is_complete, balanced in ((False, True), (True, False)):
            values = terminal_boundary(
                log_values=degenerate, completion_mask=MASK, is_complete=torch.full((3,), is_complete)
            )
            potential = flow_potential(
                log_values=values, log_prefix_scores=scores, policy_logps=policy, completion_mask=MASK
            )
            loss = subtb_loss(potential=potential, completion_mask=MASK)
            assert (loss < 1e-20).all() == balanced


class TestSubTB:
    @pytest.mark.parametrize("subtb_lambda", LAMBDAS)
    def test_matches_the_oracle(self, subtb_lambda):
        """The O(T) form must be the sum over all pairs, for every weighting, with deleted tokens."""
        potential = draw(3, 8)
        found = subtb_loss(potential=potential, completion_mask=MASK, subtb_lambda=subtb_lambda)
        expected = [oracles.subtb(row, subtb_lambda) for row in kept(potential, STATE_MASK)]
        assert found.tolist() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("subtb_lambda", [0.5, 0.99])
    def test_matches_the_oracle_across_blocks(self, subtb_lambda):
        """The recurrence is computed in blocks; a lost carry shows only in completions longer than one."""
        mask = torch.ones(2, 300, dtype=torch.bool)
        mask[1, 257:] = False
        potential = draw(2, 301)
        found = subtb_loss(potential=potential, completion_mask=mask, subtb_lambda=subtb_lambda)
        expected = [
            oracles.subtb(potential[0].tolist(), subtb_lambda),
            oracles.subtb(potential[1, :258].tolist(), subtb_lambda),
        ]
        assert found.tolist() == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize("subtb_lambda", LAMBDAS)
    def test_zero_at_balance(self, subtb_lambda):
        """A sign error in the residual makes the true solution look bad, and training walks away from it."""
        flow = draw(3, 8)
        policy = flow.diff(dim=1)  # log F(s_t) - log F(s_{t-1}) is log pi at balance
        potential = flow_potential(
            log_values=flow,
            log_prefix_scores=torch.zeros_like(flow),
            policy_logps=policy,
            completion_mask=torch.ones(3, 7, dtype=torch.bool),
        )
        loss = subtb_loss(
            potential=potential, completion_mask=torch.ones(3, 7, dtype=torch.bool), subtb_lambda=subtb_lambda
        )
        assert (loss < 1e-25).all()

    @pytest.mark.parametrize("subtb_lambda", LAMBDAS)
    def test_scale_of_the_flow_is_free(self, subtb_lambda):
        """Only ratios of flows are identified; a loss that sees their scale would fight the value head."""
        potential = draw(3, 8)
        one, other = (
            subtb_loss(potential=p, completion_mask=MASK, subtb_lambda=subtb_lambda)
            for p in (potential, potential + 300)
        )
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def test_uniform_is_twice_the_variance(self):
        """Balance means that the potential is flat: the identity behind the O(T) form."""
        potential = draw(3, 8)
        found = subtb_loss(potential=potential, completion_mask=torch.ones(3, 7, dtype=torch.bool))
        torch.testing.assert_close(found, 2 * potential.var(dim=1))

    def test_lambda_zero_is_detailed_balance(self):
        """The limit must exist: 0 ** 0 has to be 1."""
        potential = draw(3, 8)
        found = subtb_loss(potential=potential, completion_mask=torch.ones(3, 7, dtype=torch.bool), subtb_lambda=0.0)
        torch.testing.assert_close(found, potential.diff(dim=1).square().mean(dim=1))

    @pytest.mark.parametrize("subtb_lambda", [0.5, 0.9999])
    def test_float32_keeps_its_digits(self, subtb_lambda):
        """Flows span hundreds of nats: a difference of squares would leave no digit of a small residual."""
        potential = 500 + draw(2, 2049).cumsum(dim=1)
        mask = torch.ones(2, 2048, dtype=torch.bool)
        exact = subtb_loss(potential=potential, completion_mask=mask, subtb_lambda=subtb_lambda)
        single = subtb_loss(potential=potential.float(), completion_mask=mask, subtb_lambda=subtb_lambda)
        torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("subtb_lambda", [0.0, 0.7, 1.0])
    @pytest.mark.parametrize("junk", [1e3, float("inf"), float("nan")])
    def test_padding_never_matters(self, subtb_lambda, junk):
        """Padded logits are arbitrary; multiplying them by a zero mask still lets a NaN through to every gradient."""
        values, policy, rewards = draw(3, 8), draw(3, 7, seed=1), draw(3, 7, seed=2)
        results = []
        for filler in (0.0, junk):
            v = values.where(STATE_MASK, filler).requires_grad_()
            p = policy.where(MASK, filler).requires_grad_()
            scores = log_prefix_scores(token_rewards=rewards.where(MASK, filler), completion_mask=MASK)
            bounded = terminal_boundary(
                log_values=v, completion_mask=MASK, is_complete=torch.tensor([True, False, True])
            )
            potential = flow_potential(
                log_values=bounded, log_prefix_scores=scores, policy_logps=p, completion_mask=MASK
            )
            loss = subtb_loss(potential=potential, completion_mask=MASK, subtb_lambda=subtb_lambda)
            results.append((loss, *torch.autograd.grad(loss.sum(), (v, p))))
        for clean, dirty in zip(*results, strict=True):
            torch.testing.assert_close(clean, dirty)

    @pytest.mark.parametrize("subtb_lambda", [0.0, 0.7, 1.0])
    def test_gradient_matches_finite_differences(self, subtb_lambda):
        """The loss can be right and its gradient wrong."""
        assert torch.autograd.gradcheck(
            lambda potential: subtb_loss(potential=potential, completion_mask=MASK, subtb_lambda=subtb_lambda),
            draw(3, 8).requires_grad_(),
        )

    @pytest.mark.parametrize("subtb_lambda", [-0.1, 1.1])
    def test_lambda_out_of_range(self, subtb_lambda):
        """Weights above 1 explode with the length of the completion."""
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            subtb_loss(potential=draw(3, 8), completion_mask=MASK, subtb_lambda=subtb_lambda)


class TestValueDiscrimination:
    def test_first_divergence_by_hand(self):
        """Compared at any other token, the two values belong to different prefixes."""
        chosen = torch.tensor([[5, 6, 7], [5, 6, 0], [5, 6, 7]])
        rejected = torch.tensor([[5, 8, 7], [5, 6, 7], [4, 6, 7]])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
        found = first_divergence(
            chosen_ids=chosen, rejected_ids=rejected, chosen_mask=mask, rejected_mask=torch.ones_like(mask)
        )
        assert found.tolist() == [1, -1, 0]

    def test_loss_by_hand(self):
        """The value compared is that of the state after the differing token."""
        chosen, rejected = torch.tensor([[0.0, 1.0, 2.0], [0.0, 9.0, 9.0]]), torch.tensor([[0.0, 1.0, 1.5], [0.0] * 3])
        found = value_discrimination_loss(
            chosen_log_values=chosen, rejected_log_values=rejected, divergence=torch.tensor([1, -1]), value_margin=0.75
        )
        assert found.tolist() == [0.25, 0.0]

    def test_gradient_matches_finite_differences(self):
        """The hinge must push both values, in opposite directions."""
        divergence = torch.tensor([0, 3, -1])
        assert torch.autograd.gradcheck(
            lambda chosen, rejected: value_discrimination_loss(
                chosen_log_values=chosen, rejected_log_values=rejected, divergence=divergence, value_margin=1.0
            ),
            (draw(3, 8).requires_grad_(), draw(3, 8, seed=1).requires_grad_()),
        )


class TestGuidedLogps:
    @pytest.mark.parametrize("alpha, betas", [(1.0, []), (1.0, [0.7]), (0.2, [0.5, 0.3]), (1.0, [0.8, -0.8])])
    def test_matches_the_oracle(self, alpha, betas):
        """Product, mixture and ratio are one formula with different exponents."""
        patient, doctors = draw(5), [draw(5, seed=index + 1) for index in range(len(betas))]
        found = guided_logps(patient_logits=patient, doctor_logits=doctors, alpha=alpha, beta=betas).exp()
        expected = oracles.guided(
            patient.softmax(0).tolist(), [doctor.softmax(0).tolist() for doctor in doctors], alpha, betas
        )
        assert found.tolist() == pytest.approx(expected, rel=1e-12)

    def test_no_doctor_is_the_patient(self):
        """At strength zero the patient must be untouched."""
        patient = draw(2, 5)
        found = guided_logps(patient_logits=patient, doctor_logits=[draw(2, 5, seed=1)], beta=[0.0])
        torch.testing.assert_close(found, patient.log_softmax(-1))

    def test_a_constant_added_to_logits_changes_nothing(self):
        """Logits are defined up to a constant, which must not leak into beam scores."""
        patient, doctor = draw(2, 5), draw(2, 5, seed=1)
        one = guided_logps(patient_logits=patient, doctor_logits=[doctor], alpha=0.4, beta=[0.6])
        other = guided_logps(patient_logits=patient + 7, doctor_logits=[doctor - 9], alpha=0.4, beta=[0.6])
        torch.testing.assert_close(one, other)

    def test_weights_may_differ_by_row(self):
        """A server mixes requests with different strengths in one batch."""
        patient, doctor = draw(2, 5), draw(2, 5, seed=1)
        beta = torch.tensor([[0.0], [0.9]], dtype=torch.float64)
        both = guided_logps(patient_logits=patient, doctor_logits=[doctor], alpha=1 - beta, beta=[beta])
        for row in range(2):
            weight = beta[row].item()
            alone = guided_logps(
                patient_logits=patient[row], doctor_logits=[doctor[row]], alpha=1 - weight, beta=[weight]
            )
            torch.testing.assert_close(both[row], alone)

    @pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (1.0, -0.5), (0.5, 0.5), (1.0, 0.0)])
    def test_what_is_ruled_out_stays_out_and_nothing_is_nan(self, alpha, beta):
        """0 times minus infinity is NaN, and minus infinity times a negative weight is a forbidden token at +inf."""
        patient, doctor = draw(5), draw(5, seed=1)
        patient[1] = doctor[1] = doctor[2] = float("-inf")
        found = guided_logps(patient_logits=patient, doctor_logits=[doctor], alpha=alpha, beta=[beta])
        assert not found.isnan().any()
        assert found[1] == float("-inf")
        assert (found[2] == float("-inf")) == (beta > 0)
        assert found.exp().sum().item() == pytest.approx(1)

    def test_a_weight_for_each_doctor(self):
        """A forgotten weight would drop a doctor without a word."""
        with pytest.raises(ValueError, match="one exponent for each doctor"):
            guided_logps(patient_logits=draw(5), doctor_logits=[draw(5)], beta=[0.5, 0.5])


def test_entropy_by_hand():
    """A token ruled out has no weight, and is no NaN."""
    logits = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]).log()
    expected = torch.tensor([math.log(2), 0.0, 1.5 * math.log(2)])
    torch.testing.assert_close(next_token_entropy(logits + 3), expected)


def test_plausibility_is_relative_to_the_likeliest_token():
    """Else a flat distribution would be left with nothing."""
    probs = torch.tensor([[0.5, 0.06, 0.04, 0.4], [0.25, 0.25, 0.25, 0.25]])
    found = plausible_mask(patient_logits=probs.log() - 7, min_patient_prob=0.1)
    assert found.tolist() == [[True, True, False, True], [True] * 4]
    alone = plausible_mask(patient_logits=probs.log()[:1], min_patient_prob=1.0)
    assert alone.tolist() == [[True, False, False, False]]


class TestTokenLogps:
    """The one number that everything is computed from."""

    @staticmethod
    def factors():
        """Two policies of 13 and 12 ids: one with a bias and a cap, one without."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(7, 4), (13, 4), (13,), (7, 6), (12, 6)]
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    TARGETS = torch.tensor([0, 4, 5, 9, 11, 3, 10])

    @pytest.mark.parametrize("width", [1, 5, 12, 1024])
    def test_values_and_gradients_are_those_of_the_dense_product(self, monkeypatch, width):
        """A tile that is left out, or counted twice, would train another policy."""
        monkeypatch.setattr(functional, "TILE_WIDTH", width)
        factors, twins = self.factors(), self.factors()
        policies = [FactoredLogits(*factors[:3], softcap=2.0), FactoredLogits(*factors[3:])]
        found = token_logps(logits=policies, targets=self.TARGETS)
        capped = 2 * torch.tanh((twins[0] @ twins[1].T + twins[2]) / 2)
        logits = capped[:, :12] + twins[3] @ twins[4].T
        expected = logits.log_softmax(dim=-1).gather(1, self.TARGETS[:, None]).squeeze(1)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for factor, twin in zip(factors, twins, strict=True):
            torch.testing.assert_close(factor.grad, twin.grad, atol=1e-4, rtol=1e-4)

    def test_factors_and_tensors_mix(self):
        """A patient whose head is no product guides, and is guided, all the same."""
        factors = self.factors()
        first, second = FactoredLogits(*factors[:3]), FactoredLogits(*factors[3:])
        expected = token_logps(logits=[first, second], targets=self.TARGETS)
        for mixed in ([first.dense(), second], [first, second.dense()], [first.dense(), second.dense()]):
            torch.testing.assert_close(token_logps(logits=mixed, targets=self.TARGETS), expected)

    def test_half_precision_is_computed_in_it_and_summed_in_float32(self):
        """A sum of 50,000 probabilities in bfloat16 would stop growing early."""
        hidden, weight = torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(50_000, 4, dtype=torch.bfloat16)
        found = token_logps(logits=[FactoredLogits(hidden, weight)], targets=torch.tensor([7]))
        torch.testing.assert_close(found, torch.tensor([-math.log(50_000)]))

    def test_logits_are_never_held(self):
        """N x V numbers would be the largest tensor of a training step."""
        hidden = torch.randn(64, 4, requires_grad=True)
        weight = torch.randn(50_000, 4)
        with TorchDispatchSizes() as sizes:
            token_logps(logits=[FactoredLogits(hidden, weight)], targets=torch.arange(64)).sum().backward()
        assert sizes.largest <= 64 * functional.TILE_WIDTH

    def test_a_target_that_a_policy_lacks_is_impossible(self, monkeypatch):
        """A finite log-probability would train on a token that the policy cannot have."""
        monkeypatch.setattr(functional, "TILE_WIDTH", 5)
        factors = self.factors()
        policies = [FactoredLogits(*factors[:3]), FactoredLogits(*factors[3:])]
        found = token_logps(logits=policies, targets=torch.full((7,), 12))
        assert found.equal(torch.full((7,), -math.inf))

    def test_second_derivatives_are_refused(self):
        """The normaliser is saved as a constant, so they would be wrong."""
        factors = self.factors()
        loss = token_logps(logits=[FactoredLogits(*factors[:3])], targets=self.TARGETS).square().sum()
        (grad,) = torch.autograd.grad(loss, factors[0], create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


class TorchDispatchSizes(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns, views of inputs aside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output._base is None:
            self.largest = max(self.largest, output.numel())
        return output
