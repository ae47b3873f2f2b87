"""Log-probs, aggregation, KL estimators, schedules, merging, bootstrap: hand-computed numbers and named invariants."""

import importlib
import itertools
import math
import pkgutil

import numpy as np
import pytest
import torch

import algorithms
from algorithms import aggregate, bootstrap, kl, logprobs, schedule


def test_public_modules_are_exactly_those_on_disk():
    found = sorted(module.name for module in pkgutil.iter_modules(algorithms.__path__))
    assert sorted(algorithms.__all__) == found
    for name in found:
        assert importlib.import_module(f"algorithms.{name}").__doc__


def test_token_logprobs_belong_to_the_token_and_are_fp32():
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]]))
    ids = torch.tensor([[0, 1, 0]])
    expected = torch.tensor([[0.0, math.log(0.75), math.log(0.9)]])
    torch.testing.assert_close(logprobs.token_logprobs(logits, ids), expected)
    assert logprobs.token_logprobs(logits.bfloat16(), ids).dtype == torch.float32


def test_temperature_divides_the_logits():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    found = logprobs.token_logprobs(logits, torch.tensor([[0, 0]]), temperature=2.0)[0, 1]
    assert found.item() == pytest.approx(1.0 - math.log(math.e + 1.0), abs=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        logprobs.token_logprobs(logits, torch.tensor([[0, 0]]), temperature=0.0)


def test_values_move_to_the_token_they_choose():
    torch.testing.assert_close(logprobs.align_values(torch.tensor([[5.0, 6.0, 7.0]])), torch.tensor([[0.0, 5.0, 6.0]]))


def test_token_mean_and_seq_mean_weigh_long_answers_differently():
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    tokens, sequences = (aggregate.count(mask, how) for how in ("token-mean", "seq-mean"))
    assert (tokens.item(), sequences.item()) == (5.0, 2.0)
    assert aggregate.aggregate(values, mask, tokens).item() == pytest.approx(9 / 5)
    assert aggregate.aggregate(values, mask, sequences, "seq-mean").item() == pytest.approx(3.0)


def test_empty_sequences_count_nothing_and_masked_nan_is_ignored():
    values = torch.tensor([[2.0, float("nan")], [float("nan"), float("nan")]], requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 0]])
    assert aggregate.count(mask, "seq-mean").item() == 1.0
    loss = aggregate.aggregate(values, mask, 1.0, "seq-mean")
    loss.backward()
    assert loss.item() == 2.0
    assert values.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="seq-mean"):
        aggregate.aggregate(torch.zeros(1, 1), torch.ones(1, 1), 1.0, "mean")


def test_last_masked_index():
    assert aggregate.last_masked_index(torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])).tolist() == [2, -1, 3]


def test_kl_estimators_by_hand():
    logp, logp_ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    x = math.log(2.0)
    assert kl.estimate_kl(logp, logp_ref, "k1").item() == pytest.approx(x)
    assert kl.estimate_kl(logp, logp_ref, "k2").item() == pytest.approx(x * x / 2)
    assert kl.estimate_kl(logp, logp_ref, "k3").item() == pytest.approx(0.5 - 1 + x)
    assert kl.estimate_kl(logp, logp_ref, "k1", clamp=0.1).item() == pytest.approx(0.1)
    for estimator in ("k1", "k2", "k3"):
        assert kl.estimate_kl(logp, logp, estimator).item() == 0.0
    with pytest.raises(ValueError, match="k4"):
        kl.estimate_kl(logp, logp_ref, "k4")


def test_k1_and_k3_agree_with_the_exact_divergence_in_expectation():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum().item()
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    for estimator in ("k1", "k3"):
        found = kl.estimate_kl(p.log()[drawn], q.log()[drawn], estimator).mean().item()
        assert found == pytest.approx(exact, abs=0.01)


def test_cosine_reaches_peak_floor_and_stays():
    factors = [schedule.cosine(step, total=11, warmup=3, floor=0.1) for step in range(13)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[6] == pytest.approx(0.55)  # half of the way from step 2 to step 10
    assert factors[10:] == pytest.approx([0.1, 0.1, 0.1])
    assert all(a >= b for a, b in itertools.pairwise(factors[2:]))


def test_constant_and_linear():
    assert [schedule.constant(step, 2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert schedule.constant(0) == 1.0
    assert [schedule.linear(step, 5) for step in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert schedule.factor("linear", 2, 5) == schedule.linear(2, 5)


def test_a_single_step_is_taken_at_the_peak():
    for kind in ("linear", "cosine"):
        assert [schedule.factor(kind, step, 1, floor=0.0) for step in range(3)] == [1.0, 0.0, 0.0]
        assert [schedule.factor(kind, step, 2, warmup=2, floor=0.0) for step in range(3)] == [0.5, 1.0, 0.0]
    assert schedule.factor("cosine", 4, 5, floor=0.2) == pytest.approx(0.2)
    assert schedule.factor("constant", 4, 5) == 1.0
    with pytest.raises(ValueError, match="sqrt"):
        schedule.factor("sqrt", 0, 1)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    module[2].weight.requires_grad_(False)
    decayed, plain = schedule.parameter_groups(module.named_parameters(), 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 2)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 4


def test_bootstrap_error_agrees_with_the_binomial_formula_and_is_deterministic():
    scores = [1] * 300 + [0] * 700
    interval = bootstrap.mean_interval(scores, seed=3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.004) and interval.high == pytest.approx(
        0.3 + half, abs=0.004
    )
    assert interval == bootstrap.mean_interval(scores, seed=3) != bootstrap.mean_interval(scores, seed=4)


def test_pairing_narrows_the_error_of_a_difference():
    generator = np.random.default_rng(0)
    before = generator.random(500) < 0.4
    after = before | (generator.random(500) < 0.1)
    paired = bootstrap.paired_difference(before, after)
    spread = (after.astype(float) - before).std(ddof=1) / math.sqrt(500)
    assert paired.mean == pytest.approx(float(after.mean() - before.mean()))
    assert paired.standard_error == pytest.approx(spread, rel=0.1)
    unpaired = math.sqrt(before.var() / 500 + after.var() / 500)
    assert paired.standard_error < 0.6 * unpaired


def test_bootstrap_refuses_what_has_no_mean():
    for scores in ([], [[1.0]]):
        with pytest.raises(ValueError):
            bootstrap.mean_interval(scores)
    with pytest.raises(ValueError, match="2 and 1"):
        bootstrap.paired_difference([0, 1], [1])


def test_pass_at_k_by_hand():
    assert bootstrap.pass_at_k(4, 1, 1) == pytest.approx(0.25)
    assert bootstrap.pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert bootstrap.pass_at_k(4, 0, 4) == 0.0
    assert bootstrap.pass_at_k(4, 3, 2) == 1.0
    with pytest.raises(ValueError):
        bootstrap.pass_at_k(4, 5, 1)
