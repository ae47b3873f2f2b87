"""PPO, GRPO and their relatives: hand-computed numbers and step-0 identities."""

import math

import pytest
import torch

from algorithms import grpo, ppo, scores


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def policy(ratio: float, advantage: float, **options: object) -> float:
    loss, _ = ppo.policy_loss(row(math.log(ratio)), row(0.0), row(advantage), row(1), 1.0, **options)
    return loss.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 2.0, -2.2),  # inside: -r A
        (1.5, 2.0, -2.4),  # too likely already: clipped at 1.2
        (0.5, 2.0, -1.0),  # unlikely and good: not clipped
        (0.5, -2.0, 1.6),  # unlikely and bad: clipped at 0.8
        (1.5, -2.0, 3.0),  # likely and bad: not clipped
        (9.0, -2.0, 6.0),  # dual clip: at most 3 * 2
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, expected):
    assert policy(ratio, advantage) == pytest.approx(expected, rel=1e-5)


def test_dual_clip_off_clip_higher_and_huge_ratios():
    assert policy(9.0, -2.0, dual_clip=None) == pytest.approx(18.0, rel=1e-5)
    assert policy(1.25, 2.0, clip_high=0.28) == pytest.approx(-2.5, rel=1e-5)
    loss, _ = ppo.policy_loss(row(500.0), row(0.0), row(-1.0), row(1), 1.0, dual_clip=None)
    assert loss.item() == pytest.approx(math.exp(20.0), rel=1e-4)
    with pytest.raises(ValueError, match="dual_clip"):
        policy(1.0, 1.0, dual_clip=0.5)


def test_at_step_0_the_policy_gradient_is_minus_the_advantage():
    logp = row(-0.3, -1.2, -4.0).requires_grad_()
    advantages = row(1.0, -2.0, 0.5)
    loss, sums = ppo.policy_loss(logp, logp.detach(), advantages, row(1, 1, 1), 3.0)
    loss.backward()
    torch.testing.assert_close(logp.grad, -advantages / 3)
    assert loss.item() == pytest.approx(-advantages.mean().item())
    assert (sums["ratio"] / sums["tokens"]).item() == 1.0
    assert sums["clipped"].item() == 0.0 and sums["approx_kl"].item() == 0.0


def test_clipped_tokens_are_counted_and_get_no_gradient():
    logp = row(math.log(1.5), 0.0).requires_grad_()
    loss, sums = ppo.policy_loss(logp, row(0.0, 0.0), row(1.0, 1.0), row(1, 1), 1.0)
    loss.backward()
    assert sums["clipped"].item() == 1.0
    assert logp.grad.tolist() == [[0.0, -1.0]]


def test_value_loss_by_hand():
    arguments = (row(1.0), row(0.0), row(2.0), row(1), 1.0)
    assert ppo.value_loss(*arguments, clip=None).item() == pytest.approx(0.5)
    assert ppo.value_loss(*arguments, clip=0.2).item() == pytest.approx(0.5 * 1.8**2)
    away = (row(3.0), row(2.9), row(2.0), row(1), 1.0)
    assert ppo.value_loss(*away, clip=0.2).item() == pytest.approx(0.5)


def test_token_rewards_put_the_score_on_the_last_response_token():
    rewards = ppo.token_rewards(
        torch.tensor([5.0, 7.0]),
        torch.tensor([[9.0, -1.0, -2.0, 9.0], [0.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, -1.5, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),
        torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]),
        beta=0.1,
    )
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.05, 5.1, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_gae_by_hand():
    rewards, values = row(0.0, 1.0, 2.0), row(0.5, 0.6, 0.7)
    advantages, returns = ppo.gae(rewards, values, row(1, 1, 1), gamma=0.9, lam=0.8)
    third = 2.0 - 0.7
    second = 1.0 + 0.9 * 0.7 - 0.6 + 0.72 * third
    first = 0.9 * 0.6 - 0.5 + 0.72 * second
    torch.testing.assert_close(advantages, row(first, second, third))
    torch.testing.assert_close(returns, advantages + values)


def test_gae_with_gamma_and_lambda_1_is_reward_to_go_minus_value():
    rewards, values = row(0.1, -0.2, 3.0), row(0.5, 0.6, 0.7)
    advantages, returns = ppo.gae(rewards, values, row(1, 1, 1), 1.0, 1.0)
    torch.testing.assert_close(returns, row(2.9, 2.8, 3.0))
    torch.testing.assert_close(advantages, returns - values)


def test_gae_skips_masked_tokens_as_if_they_were_not_there():
    rewards, values = row(0.3, 99.0, 1.0, 99.0), row(0.5, 99.0, 0.7, 99.0)
    with_gap, returns = ppo.gae(rewards, values, row(1, 0, 1, 0), 0.9, 0.8)
    without, _ = ppo.gae(row(0.3, 1.0), row(0.5, 0.7), row(1, 1), 0.9, 0.8)
    torch.testing.assert_close(with_gap, row(without[0, 0], 0.0, without[0, 1], 0.0))
    assert returns[0, 1] == 0.0 and returns[0, 3] == 0.0


def test_a_truncated_answer_bootstraps_from_its_last_value():
    rewards, values, mask = row(0.0, 1.0, 0.0), row(0.5, 0.6, 0.0), row(1, 1, 0)
    finished, _ = ppo.gae(rewards, values, mask, 1.0, 1.0, torch.tensor([False]))
    truncated, _ = ppo.gae(rewards, values, mask, 1.0, 1.0, torch.tensor([True]))
    torch.testing.assert_close(finished, row(0.5, 0.4, 0.0))
    torch.testing.assert_close(truncated, row(1.1, 1.0, 0.0))


def test_whitening_by_hand_and_its_variants():
    values, mask = row(1.0, 2.0, 3.0, 99.0), row(1, 1, 1, 0)
    torch.testing.assert_close(ppo.whiten(values, mask), row(-1.0, 0.0, 1.0, 0.0))
    biased = math.sqrt(1.5)
    torch.testing.assert_close(ppo.whiten(values, mask, unbiased=False), row(-biased, 0.0, biased, 0.0))
    torch.testing.assert_close(ppo.whiten(values, mask, shift_mean=False), row(1.0, 2.0, 3.0, 0.0))
    assert ppo.whiten(torch.full((4,), 0.3), torch.ones(4)).abs().max() < 1e-3
    with pytest.raises(ValueError, match="two entries"):
        ppo.whiten(values, row(1, 0, 0, 0))


def test_llama2_score_prefers_safety_on_safety_prompts_and_below_the_threshold():
    helpful, safety = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, -2.0])
    combined = scores.combine_scores(helpful, safety, torch.tensor([True, False, False]))
    assert torch.sigmoid(safety[2]) < 0.15 < torch.sigmoid(safety[1])
    assert combined.tolist() == [1.0, 2.0, -2.0]


def test_the_verifier_joins_only_where_an_answer_is_checkable():
    combined = torch.tensor([1.0, 2.0, 3.0])
    verdicts, checkable = torch.tensor([1.0, 0.0, float("nan")]), torch.tensor([True, True, False])
    joined = scores.score_answers(combined, verdicts, checkable, verifier_weight=2.0, model_weight=0.5)
    torch.testing.assert_close(joined, torch.tensor([1.5, -2.0, 1.0]))


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    grouped = grpo.grpo_advantages(rewards)
    torch.testing.assert_close(grouped[0], torch.tensor([1.5, -0.5, -0.5, -0.5]))
    assert grouped[1].tolist() == [0.0] * 4
    torch.testing.assert_close(grpo.grpo_advantages(rewards, scale=False)[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(grpo.rloo_advantages(rewards)[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    for advantages in (grpo.grpo_advantages, grpo.rloo_advantages):
        with pytest.raises(ValueError, match="at least 2"):
            advantages(torch.ones(3, 1))


def test_reinforce_pp_whitens_rewards_to_go():
    rewards, mask = row(1.0, 9.0, 2.0, 0.0), row(1, 0, 1, 1)
    torch.testing.assert_close(grpo.rewards_to_go(rewards, mask, 0.5), row(2.0, 0.0, 2.0, 0.0))
    white = grpo.reinforce_pp_advantages(rewards, mask, 0.5)
    torch.testing.assert_close(white, ppo.whiten(row(2.0, 0.0, 2.0, 0.0), mask))


def test_spreading_puts_an_answers_advantage_on_its_own_tokens():
    spread = grpo.spread(torch.tensor([[2.0, 3.0]]), torch.tensor([[1, 1, 0], [0, 1, 1]]))
    assert spread.tolist() == [[2.0, 2.0, 0.0], [0.0, 3.0, 3.0]]


def test_grpo_is_the_clipped_term_plus_the_kl_and_zero_kl_at_the_reference():
    logp, old, advantages, mask = row(-0.1, -0.5), row(-0.2, -0.4), row(1.0, 1.0), row(1, 1)
    bare, _ = ppo.policy_loss(logp, old, advantages, mask, 1.0, dual_clip=None, reduction="seq-mean")
    same, sums = grpo.grpo_loss(logp, old, logp, advantages, mask, 1.0, beta=0.5)
    assert same.item() == bare.item() and sums["kl"].item() == 0.0
    far, sums = grpo.grpo_loss(logp, old, logp - math.log(2.0), advantages, mask, 1.0, beta=0.5)
    k3 = 0.5 - 1 + math.log(2.0)
    assert far.item() == pytest.approx(bare.item() + 0.5 * k3, abs=1e-6)
    assert sums["kl"].item() == pytest.approx(2 * k3, abs=1e-6)


def test_dapo_is_token_mean_with_the_higher_clip():
    loss, sums = grpo.dapo_loss(row(math.log(1.25), math.log(1.5)), row(0.0, 0.0), row(1.0, 1.0), row(1, 1), 2.0)
    assert loss.item() == pytest.approx(-(1.25 + 1.28) / 2, rel=1e-5)
    assert sums["clipped"].item() == 1.0


def test_dapo_overlong_penalty_and_informative_groups():
    penalty = grpo.overlong_penalty(torch.tensor([10, 16, 18, 20, 25]), max_length=20, buffer=4)
    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="buffer"):
        grpo.overlong_penalty(torch.tensor([1]), max_length=4, buffer=5)
    assert grpo.informative_groups(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist() == [False, True]


def test_sampler_weights_truncate_or_leave_out():
    old, sampler, mask = row(math.log(0.9), math.log(0.2), 0.0), row(math.log(0.1), math.log(0.4), 5.0), row(1, 1, 0)
    torch.testing.assert_close(grpo.sampler_weights(old, sampler, mask, cap=2.0), row(2.0, 0.5, 0.0))
    torch.testing.assert_close(grpo.sampler_weights(old, sampler, mask, cap=None), row(9.0, 0.5, 0.0))
    torch.testing.assert_close(grpo.sampler_weights(old, sampler, mask, None, (0.4, 4.0)), row(0.0, 0.5, 0.0))
    torch.testing.assert_close(grpo.sampler_weights(old, old, mask), mask)
