"""Every loss and its gradient are the same however the batch is cut: micro-batches, accumulation, ranks, packing."""

from collections.abc import Callable

import pytest
import torch

from algorithms import aggregate, dpo, grpo, ppo, reward, sft

ROWS, LENGTH = 12, 9
Rows = dict[str, torch.Tensor]


def make_rows() -> Rows:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([1, 9, 4, 2, 7, 1, 3, 9, 5, 6, 2, 8])
    mask = torch.arange(LENGTH) < lengths[:, None]
    mask[4, 2] = False  # a hole: tool output
    rows = {name: noise(ROWS, LENGTH) for name in ("logp", "old", "ref", "advantages", "values", "returns", "weights")}
    rows |= {"mask": mask, "good": torch.arange(ROWS) % 3 > 0, "margins": noise(ROWS).abs()}
    rows["logp"] = rows["old"] + 0.3 * rows["logp"]
    rows["ref"] = rows["old"] + 0.3 * rows["ref"]
    rows["weights"] = rows["weights"].abs()
    return rows


def sums(rows: Rows, name: str) -> torch.Tensor:
    return dpo.response_logprobs(rows[name], rows["mask"])


def pairs(rows: Rows) -> tuple[torch.Tensor, ...]:
    """Even rows are chosen, the odd row after each is its rejected one."""
    logp, ref = sums(rows, "logp"), sums(rows, "ref")
    return logp[::2], logp[1::2], ref[::2], ref[1::2]


TOKEN = {
    "sft token-mean": lambda r, n, s: sft.sft_loss(r["logp"], r["mask"], n, "token-mean", s),
    "sft seq-mean": lambda r, n, s: sft.sft_loss(r["logp"], r["mask"], n, "seq-mean", s),
    "ppo policy": lambda r, n, s: ppo.policy_loss(
        r["logp"], r["old"], r["advantages"], r["mask"], n, sampler_weights=r["weights"], segment_ids=s
    )[0],
    "ppo value": lambda r, n, s: ppo.value_loss(r["logp"], r["values"], r["returns"], r["mask"], n, segment_ids=s),
    "grpo seq-mean": lambda r, n, s: grpo.grpo_loss(
        r["logp"], r["old"], r["ref"], r["advantages"], r["mask"], n, segment_ids=s
    )[0],
    "dapo": lambda r, n, s: grpo.dapo_loss(r["logp"], r["old"], r["advantages"], r["mask"], n, segment_ids=s)[0],
    "chosen nll seq-mean": lambda r, n, s: dpo.chosen_nll(r["logp"], r["mask"], n, "seq-mean"),
    "chosen nll token-mean": lambda r, n, s: dpo.chosen_nll(r["logp"], r["mask"], n, "token-mean"),
}
PAIR = {
    "dpo": lambda r, n: dpo.dpo_loss(*pairs(r), beta=0.1, denominator=n)[0],
    "cdpo": lambda r, n: dpo.dpo_loss(*pairs(r), beta=0.1, denominator=n, label_smoothing=0.2)[0],
    "ipo": lambda r, n: dpo.ipo_loss(*pairs(r), beta=0.1, denominator=n)[0],
    "bradley-terry": lambda r, n: reward.bradley_terry_loss(*pairs(r)[:2], n, r["margins"][::2]),
    "kto": lambda r, n: dpo.kto_loss(
        sums(r, "logp"), sums(r, "ref"), r["good"], torch.tensor(0.3), 0.1, 2 * n, 1.0, 1.5
    ),
}


def reduction_of(name: str) -> aggregate.Reduction:
    return "seq-mean" if "seq-mean" in name else "token-mean"


def loss_and_gradient(loss: Callable[[Rows], torch.Tensor], cuts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of row ranges; `cuts` is one list of micro-batch sizes per rank."""
    rows = make_rows()
    leaf = rows["logp"].requires_grad_()
    total, start = torch.zeros(()), 0
    for sizes in cuts:  # ranks, then micro-batches of one rank: the learner sums over both
        for size in sizes:
            total = total + loss({name: tensor[start : start + size] for name, tensor in rows.items()})
            start += size
    assert start == ROWS
    total.backward()
    return total.detach(), leaf.grad


CUTS = {
    "micro-batch 2": [[2] * 6],
    "uneven micro-batches": [[2, 8, 2]],
    "two ranks": [[6], [6]],
    "three ranks, uneven accumulation": [[4], [2, 2], [2, 2]],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", [*TOKEN, *PAIR])
def test_cutting_the_batch_changes_nothing(name, cut):
    def loss(rows: Rows) -> torch.Tensor:
        if name in PAIR:
            return PAIR[name](rows, ROWS / 2)
        return TOKEN[name](rows, denominator, None)

    denominator = aggregate.count(make_rows()["mask"], reduction_of(name))
    whole, gradient = loss_and_gradient(loss, [[ROWS]])
    cut_loss, cut_gradient = loss_and_gradient(loss, CUTS[cut])
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(cut_loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-5, atol=1e-6)


def test_local_means_would_not_pass():
    """The invariance is worth its name: dividing by each micro-batch's own count gives another number."""
    denominator = aggregate.count(make_rows()["mask"], "token-mean")
    whole, _ = loss_and_gradient(lambda r: sft.sft_loss(r["logp"], r["mask"], denominator), [[ROWS]])
    local, _ = loss_and_gradient(lambda r: sft.sft_loss(r["logp"], r["mask"], r["mask"].sum()) / 6, [[2] * 6])
    assert abs(whole - local) > 0.01


def pack(rows: Rows, width: int) -> tuple[Rows, torch.Tensor]:
    """First-fit rows into rows of `width`; returns the packed tensors and segment ids from 1 per row."""
    bins: list[list[int]] = []
    lengths = [int(aggregate.last_masked_index(row[None])) + 1 for row in rows["mask"]]
    for index, length in enumerate(lengths):
        home = next((b for b in bins if sum(lengths[i] for i in b) + length <= width), None)
        if home is None:
            home = []
            bins.append(home)
        home.append(index)
    segments = torch.zeros(len(bins), width, dtype=torch.long)
    packed = {name: tensor.new_zeros(len(bins), width) for name, tensor in rows.items() if tensor.dim() == 2}
    for number, members in enumerate(bins):
        at = 0
        for segment, index in enumerate(members, start=1):
            span = slice(at, at + lengths[index])
            segments[number, span] = segment
            for name, target in packed.items():
                target[number, span] = rows[name][index, : lengths[index]]
            at += lengths[index]
    assert len(bins) < len(lengths)
    return packed, segments


@pytest.mark.parametrize("name", [name for name in TOKEN if not name.startswith("chosen")])
def test_packing_changes_nothing(name):
    rows = make_rows()
    leaf = rows["logp"].requires_grad_()
    denominator = aggregate.count(rows["mask"], reduction_of(name))
    packed, segments = pack(rows, 16)
    assert aggregate.count(packed["mask"], reduction_of(name), segments).item() == denominator.item()
    plain, together = TOKEN[name](rows, denominator, None), TOKEN[name](packed, denominator, segments)
    torch.testing.assert_close(together, plain, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(plain, leaf)
    (found,) = torch.autograd.grad(together, leaf)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_channel_losses_are_invariant_and_add_up():
    rows = make_rows()
    channels = torch.arange(ROWS) % 3
    total, tokens = sft.channel_losses(rows["logp"], rows["mask"], channels, 3)
    halves = [sft.channel_losses(rows["logp"][h], rows["mask"][h], channels[h], 3) for h in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], total)
    assert tokens.sum() == rows["mask"].sum()
    mean = sft.sft_loss(rows["logp"], rows["mask"], tokens.sum())
    torch.testing.assert_close(total.sum() / tokens.sum(), mean)
    per_token = channels[:, None].expand(ROWS, LENGTH)
    torch.testing.assert_close(sft.channel_losses(rows["logp"], rows["mask"], per_token, 3)[0], total)


def test_policy_metrics_add_up():
    rows = make_rows()
    arguments = [rows[name] for name in ("logp", "old", "advantages", "mask")]
    _, whole = ppo.policy_loss(*arguments, 1.0)
    parts = [ppo.policy_loss(*[a[h] for a in arguments], 1.0)[1] for h in (slice(0, 5), slice(5, 12))]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_whitening_does_not_depend_on_the_number_of_ranks():
    rows = make_rows()
    whole = ppo.whiten(rows["values"], rows["mask"])
    halves = [slice(0, 5), slice(5, 12)]
    total = sum(ppo.moments(rows["values"][h], rows["mask"][h]) for h in halves)
    for half in halves:
        torch.testing.assert_close(ppo.whiten(rows["values"][half], rows["mask"][half], total), whole[half])


def test_masked_positions_may_hold_anything():
    rows = make_rows()
    for name in ("logp", "old", "ref", "advantages", "values", "returns"):
        rows[name] = rows[name].masked_fill(~rows["mask"], float("nan"))
    leaf = rows["logp"].requires_grad_()
    for name, loss in TOKEN.items():
        (gradient,) = torch.autograd.grad(loss(rows, 10.0, None), leaf)
        assert torch.isfinite(gradient).all(), name
