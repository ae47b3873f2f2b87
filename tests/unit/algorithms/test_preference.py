"""Preference losses, reward models and rejection sampling: hand-computed numbers and step-0 identities."""

import math

import pytest
import torch

from algorithms import dpo, rejection, reward


def some_logprobs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([-3.0, -7.0, -0.5], requires_grad=True), torch.tensor([-4.0, -2.0, -0.5], requires_grad=True)


def test_at_step_0_dpo_is_log_2_and_ipo_a_quarter_over_beta_squared():
    chosen, rejected = some_logprobs()
    references = (chosen.detach(), rejected.detach())
    for smoothing in (0.0, 0.3):
        loss, sums = dpo.dpo_loss(chosen, rejected, *references, 0.1, 3.0, smoothing)
        assert loss.item() == pytest.approx(math.log(2.0))
        assert sums["margin"].item() == 0.0 and sums["pairs"].item() == 3.0
    loss, _ = dpo.ipo_loss(chosen, rejected, *references, beta=0.1, denominator=3.0)
    assert loss.item() == pytest.approx(1 / (4 * 0.1**2))


def test_dpo_gradient_at_step_0_is_half_of_beta():
    chosen, rejected = some_logprobs()
    loss, _ = dpo.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1, 3.0)
    loss.backward()
    torch.testing.assert_close(chosen.grad, torch.full((3,), -0.05 / 3))
    torch.testing.assert_close(rejected.grad, torch.full((3,), 0.05 / 3))


def test_dpo_by_hand():
    arguments = (torch.tensor([-1.0]), torch.tensor([-4.0]), torch.tensor([-2.0]), torch.tensor([-3.0]))
    z = 0.5 * ((-1.0 + 2.0) - (-4.0 + 3.0))
    expected = math.log1p(math.exp(-z))
    loss, sums = dpo.dpo_loss(*arguments, beta=0.5, denominator=1.0)
    assert loss.item() == pytest.approx(expected)
    found = {name: value.item() for name, value in sums.items()}
    assert found == {"pairs": 1, "accuracy": 1, "margin": 1.0, "chosen_reward": 0.5, "rejected_reward": -0.5}
    loss, _ = dpo.dpo_loss(*arguments, beta=0.5, denominator=1.0, label_smoothing=0.25)
    assert loss.item() == pytest.approx(0.75 * expected + 0.25 * math.log1p(math.exp(z)))
    loss, _ = dpo.ipo_loss(*arguments, beta=0.5, denominator=1.0)
    assert loss.item() == pytest.approx((2.0 - 1.0) ** 2)


def test_cdpo_stops_pushing_at_its_own_margin():
    """With smoothing s the gradient is zero where sigmoid(z) = 1 - s."""
    z = math.log(0.8 / 0.2)
    chosen = torch.tensor([z], requires_grad=True)
    zero = torch.zeros(1)
    loss, _ = dpo.dpo_loss(chosen, zero, zero, zero, beta=1.0, denominator=1.0, label_smoothing=0.2)
    loss.backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_kto_at_step_0_is_half_and_by_hand_afterwards():
    logp, good = torch.tensor([-2.0, -3.0]), torch.tensor([True, False])
    loss = dpo.kto_loss(logp, logp, good, torch.tensor(0.0), beta=0.1, denominator=2.0)
    assert loss.item() == pytest.approx(0.5)
    baseline = dpo.kto_baseline(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0]))
    assert baseline.item() == 0.5
    assert dpo.kto_baseline(torch.tensor([-3.0]), torch.tensor([-2.0])).item() == 0.0
    loss = dpo.kto_loss(logp + 1.0, logp, good, baseline, 1.0, 2.0, desirable_weight=1.0, undesirable_weight=2.0)
    up = 1 / (1 + math.exp(-0.5))
    assert loss.item() == pytest.approx(((1 - up) + 2.0 * up) / 2)


def test_the_two_nll_denominators_by_hand():
    logprobs = torch.tensor([[0.0, -1.0, -3.0], [0.0, -6.0, 0.0]])
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    assert dpo.chosen_nll(logprobs, mask, 3.0, "token-mean").item() == pytest.approx(10 / 3)
    assert dpo.chosen_nll(logprobs, mask, 2.0, "seq-mean").item() == pytest.approx((2.0 + 6.0) / 2)


def test_response_logprobs_sum_or_mean():
    logprobs, mask = torch.tensor([[-9.0, -1.0, -3.0]]), torch.tensor([[0, 1, 1]])
    assert dpo.response_logprobs(logprobs, mask).item() == -4.0
    assert dpo.response_logprobs(logprobs, mask, normalise=True).item() == -2.0


def test_formatting_tokens_leave_the_dpo_term():
    start, end, blank, eot = 90, 91, 92, 93
    ids = torch.tensor([[5, eot, start, 6, end, blank, 7, 8, eot]])
    everything = torch.ones_like(ids)
    kept = dpo.content_mask(ids, everything, (eot,), start, end)
    assert kept.tolist() == [[True, False, False, False, False, False, True, True, False]]
    assert dpo.content_mask(ids, everything, (eot,)).sum() == 7
    wider = dpo.content_mask(ids, everything, (eot,), start, end, header_suffix=2)
    assert wider.tolist() == [[True, False, False, False, False, False, False, True, False]]
    only_answer = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    assert dpo.content_mask(ids, only_answer, (eot,), start, end).sum() == 2


def test_margin_tables_of_llama_2():
    ratings = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(reward.margin_by_rating(ratings, "small"), torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]))
    assert reward.margin_by_rating(ratings, "large").tolist() == [3.0, 2.0, 1.0, 0.0]
    assert reward.margin_by_rating(ratings, "none").tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="huge"):
        reward.margin_by_rating(ratings, "huge")


def test_bradley_terry_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    loss = reward.bradley_terry_loss(chosen, rejected, 2.0)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.0)) + math.log(2.0)) / 2)
    with_margin = reward.bradley_terry_loss(chosen, rejected, 2.0, torch.tensor([1.0, 0.0]))
    assert with_margin.item() == pytest.approx(math.log(2.0))


def test_scores_are_read_at_the_last_real_token():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert reward.last_token_scores(values, torch.tensor([[1, 1, 0], [1, 1, 1]])).tolist() == [2.0, 6.0]


def test_accuracy_by_rating():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 1.0])
    correct, pairs = reward.accuracy_by_rating(chosen, rejected, torch.tensor([0, 0, 3, 3]))
    assert correct.tolist() == [1.0, 0.0, 0.0, 1.5]
    assert pairs.tolist() == [2.0, 0.0, 0.0, 2.0]


def test_calibration_error_by_hand():
    probabilities, outcomes = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.2, 1.0]), torch.tensor([1, 1, 1, 0, 0, 1])
    expected = (abs(4 * 0.9 + 1.0 - 4) + 0.2) / 6  # the bin from 0.9 has 0.9 four times and 1.0, and 4 of 5 are right
    assert reward.expected_calibration_error(probabilities, outcomes) == pytest.approx(expected)
    assert reward.expected_calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1, 0])) == 0.0
    with pytest.raises(ValueError):
        reward.expected_calibration_error(torch.tensor([]), torch.tensor([]))


def test_the_best_of_k_with_ties_and_threshold():
    scores = torch.tensor([[0.1, 0.9, 0.9], [0.5, 0.5, 0.5], [-1.0, -2.0, -0.5]])
    assert rejection.best_of_k(scores).tolist() == [1, 0, 2]
    assert rejection.best_of_k(scores, threshold=0.9).tolist() == [1, -1, -1]
    with pytest.raises(ValueError, match="NaN"):
        rejection.best_of_k(torch.tensor([[float("nan"), 1.0]]))


def test_preference_pairs_need_a_gap():
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.4, 0.2, 0.6]])
    assert rejection.preference_pairs(scores) == [(0, 1, 0), (2, 2, 1)]
    assert rejection.preference_pairs(scores, minimum_gap=0.5) == [(0, 1, 0)]
    assert rejection.preference_pairs(scores, minimum_gap=2.0) == []
