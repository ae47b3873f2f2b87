"""DeepSpeedLearner against plain torch in one process: the same gradients, updates and states, whatever is sharded."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from engines.config import LearnerSettings
from engines.forward import logits, model_inputs, values
from infra.errors import CheckpointError
from tests.helpers.ports import free_ports

STAGES = (0, 1, 2, 3)
DEADLINE = 500


def settings(stage: int = 0, **changes: Any) -> LearnerSettings:
    return LearnerSettings(
        zero_stage=stage, learning_rate=1e-3, total_steps=10, warmup_steps=2, max_grad_norm=0.5, threads=1, **changes
    )


def micro_batches(count: int, seed: int, rows: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        lengths = torch.randint(6, length + 1, (rows,), generator=generator)
        batches.append(
            {
                "input_ids": torch.randint(2, 96, (rows, length), generator=generator),
                "attention_mask": (torch.arange(length)[None] < lengths[:, None]).long(),
            }
        )
    return batches


def nll(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Token NLL over a fixed global denominator."""
    logp = logits(module, batch).float().log_softmax(-1)[:, :-1]
    chosen = logp.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * batch["attention_mask"][:, 1:]
    return -chosen.sum() / 50.0, {"rows": float(len(chosen))}


def poisoned(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    loss, metrics = nll(module, batch)
    return loss * float("nan"), metrics


def squared(module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    return (values(module, batch) - 1.0).square().mean(), {}


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.export()}


def rank_main(rank: int, world: int, ports: list[int], folder: Path, source: Path, answer: Any) -> None:
    from engines.deepspeed import process_group
    from engines.deepspeed.learner import build

    seat: dict[str, Any] = {"rank": rank, "world_size": world, "address": f"127.0.0.1:{ports[0]}"}
    found: dict[Any, Any] = {}
    for stage in STAGES:
        for accumulate in (True, False):
            learner = build(source, settings(stage), **seat)
            outputs = [learner.train_step(share(step, rank, world, accumulate), nll) for step in range(3)]
            found[stage, accumulate] = {
                "norms": [output.grad_norm for output in outputs],
                "rates": [output.learning_rate for output in outputs],
                "rows": [output.metrics["rows"] for output in outputs],
                "weights": weights(learner),
            }
            if accumulate:
                found[stage, "nan"] = refuse_nan(learner, rank, world)
                found[stage, "state"] = save_and_go_on(learner, folder / f"state-{stage}-{world}", rank, world)
                learner.save_hf(folder / f"hf-{stage}-{world}")
            learner.close()
    found["resumed"] = {stage: resume(stage, folder, source, seat) for stage in STAGES}
    found["coexist"] = coexist(source, folder / f"critic-{world}", seat)
    process_group.leave()
    seat["address"] = f"127.0.0.1:{ports[1]}"
    learner = build(source, settings(1), **seat)  # the same process in a second group
    found["rejoined"] = learner.train_step(share(0, rank, world, True), nll).grad_norm
    learner.close()
    process_group.leave()
    if rank == 0:
        torch.save(found, folder / f"found-{world}.pt")
        answer.send("saved")


def share(step: int, rank: int, world: int, accumulate: bool) -> list[dict[str, torch.Tensor]]:
    mine = micro_batches(4, seed=step)[rank::world]
    return mine if accumulate else [{name: torch.cat([batch[name] for batch in mine]) for name in mine[0]}]


def refuse_nan(learner: Any, rank: int, world: int) -> tuple[bool, bool, int]:
    """The last rank alone has a NaN."""
    before = weights(learner)
    output = learner.train_step(share(3, rank, world, True), poisoned if rank == world - 1 else nll)
    unchanged = all(torch.equal(before[name], tensor) for name, tensor in weights(learner).items())
    return output.committed, unchanged, learner.step


def save_and_go_on(learner: Any, folder: Path, rank: int, world: int) -> dict[str, torch.Tensor]:
    learner.save_state(folder)
    learner.train_step(share(4, rank, world, True), nll)
    return weights(learner)


def resume(stage: int, folder: Path, source: Path, seat: dict[str, Any]) -> dict[str, torch.Tensor]:
    """From the state that the *other* stage 3-s saved with as many ranks."""
    from engines.deepspeed.learner import build

    learner = build(source, settings(stage), **seat)
    learner.load_state(folder / f"state-{3 - stage}-{seat['world_size']}")
    learner.train_step(share(4, seat["rank"], seat["world_size"], True), nll)
    after = weights(learner)
    learner.close()
    return after


def coexist(source: Path, folder: Path, seat: dict[str, Any]) -> dict[str, Any]:
    """Policy, critic, frozen reference in one process; the reference must not move."""
    from engines.deepspeed.learner import build

    policy = build(source, settings(2), **seat)
    critic = build(source, settings(1), head="scalar", **seat)
    reference = build(source, settings(0), frozen=True, **seat)
    batch = micro_batches(1, seed=7)
    before = reference.evaluate(batch, logits)[0]
    losses = []
    for _ in range(3):
        policy.train_step(batch, nll)
        critic.train_step(batch, lambda module, item: (squared(module, item)[0] / seat["world_size"], {}))
        losses.append(float(critic.evaluate(batch, squared)[0][0]))
    moved = policy.evaluate(batch, logits)[0]
    result = {
        "reference_still": torch.equal(before, reference.evaluate(batch, logits)[0]),
        "policy_moved": not torch.equal(before, moved),
        "critic_losses": losses,
        "values": critic.evaluate(batch, values)[0],
    }
    critic.save_hf(folder)
    again = build(folder, settings(0), head="scalar", frozen=True, **seat)
    result["values_again"] = again.evaluate(batch, values)[0]
    result["names_a_folder"] = str(source) in (folder / "config.json").read_text()
    for learner in (policy, critic, reference, again):
        learner.close()
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=33 * 2,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def found(source: Path) -> dict[int, dict[Any, Any]]:
    """What rank 0 of a group of one and of a group of two found, both run at once."""
    context = multiprocessing.get_context("spawn")
    receivers, processes = {}, []
    ports = free_ports(4)
    for world in (1, 2):
        receivers[world], sender = context.Pipe(duplex=False)
        own = ports[2 * world - 2 : 2 * world]
        for rank in range(world):
            arguments = (rank, world, own, source.parent, source, sender)
            processes.append(context.Process(target=rank_main, args=arguments))
            processes[-1].start()
        sender.close()
    try:
        answers = {}
        for world, receiver in receivers.items():
            assert receiver.poll(DEADLINE), f"the group of {world} did not finish"
            assert receiver.recv() == "saved"
            answers[world] = torch.load(source.parent / f"found-{world}.pt", weights_only=False)
        for process in processes:
            process.join(30)
        return answers
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def plain(source: Path) -> dict[str, Any]:
    """Three steps of plain torch on all micro-batches."""
    from engines.optimizer import learning_rate

    model = AutoModelForCausalLM.from_pretrained(source)
    chosen = settings()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": chosen.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=chosen.betas, eps=chosen.eps)
    norms = []
    for step in range(3):
        for batch in micro_batches(4, seed=step):
            nll(model, batch)[0].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(chosen, step)
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "weights": {name: p.detach() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_updates_equal_plain_torch(
    found: dict[int, Any], plain: dict[str, Any], stage: int, accumulate: bool, world: int
) -> None:
    got = found[world][stage, accumulate]
    assert min(plain["norms"]) > settings().max_grad_norm, "the test must exercise clipping"
    assert got["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    assert got["rates"] == pytest.approx([5e-4, 1e-3, 1e-3 * (0.1 + 0.9 * 0.961940)])
    assert got["rows"] == [8.0 / world] * 3
    assert got["weights"].keys() == plain["weights"].keys()
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(got["weights"][name], tensor, atol=2e-5, rtol=0)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_one_ranks_nan_commits_nowhere(found: dict[int, Any], stage: int, world: int) -> None:
    assert found[world][stage, "nan"] == (False, True, 3)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_state_resumes_under_another_stage(found: dict[int, Any], stage: int, world: int) -> None:
    went_on = found[world][3 - stage, "state"]
    for name, tensor in found[world]["resumed"][stage].items():
        torch.testing.assert_close(tensor, went_on[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [1, 3])
def test_saved_folder_loads_in_plain_transformers(found: dict[int, Any], source: Path, stage: int, world: int) -> None:
    folder = source.parent / f"hf-{stage}-{world}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = found[world][stage, "state"]
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected[name]), name
    assert (folder / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("world", [1, 2])
def test_policy_critic_and_reference_share_a_process(found: dict[int, Any], source: Path, world: int) -> None:
    result = found[world]["coexist"]
    assert result["reference_still"] and result["policy_moved"]
    assert result["critic_losses"] == sorted(result["critic_losses"], reverse=True)
    assert torch.equal(result["values"], result["values_again"])
    assert not result["names_a_folder"], "equal models in other folders have equal files"
    classifier = AutoModelForSequenceClassification.from_pretrained(source.parent / f"critic-{world}", num_labels=1)
    batch = micro_batches(1, seed=7)[0]
    whole = {name: tensor[:1, :6] for name, tensor in batch.items()}
    classifier.config.pad_token_id = 0
    torch.testing.assert_close(classifier(**whole).logits[0, 0], result["values"][0, 5], atol=1e-5, rtol=0)


@pytest.mark.parametrize("world", [1, 2])
def test_a_process_can_join_a_second_group(found: dict[int, Any], plain: dict[str, Any], world: int) -> None:
    assert found[world]["rejoined"] == pytest.approx(plain["norms"][0], rel=1e-4)


def test_packed_rows_equal_separate_rows(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])
    packed = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]]),
        "segment_ids": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0]]),
    }
    with torch.no_grad():
        together = logits(model, packed)
        torch.testing.assert_close(together[:, :4], logits(model, {"input_ids": first}), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[:, 4:7], logits(model, {"input_ids": second}), atol=1e-5, rtol=1e-5)
    assert bool(torch.isfinite(together).all())


def test_left_padding_is_refused() -> None:
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ValueError, match="pad on the right"):
        model_inputs(batch)


def test_missing_tensors_are_refused(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from engines.hf_folder import load_model

    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path, "lm", torch.float32)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_model(tmp_path, "lm", torch.float32)


def test_schedule() -> None:
    from engines.optimizer import learning_rate

    cosine = LearnerSettings(learning_rate=1.0, warmup_steps=2, total_steps=6, final_learning_rate=0.1)
    rates = [learning_rate(cosine, step) for step in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 0.1 + 0.9 * 0.853553, 0.55, 0.1 + 0.9 * 0.146447, 0.1, 0.1, 0.1], abs=1e-5)
    assert learning_rate(LearnerSettings(learning_rate=2.0, schedule="constant"), 99) == 2.0
