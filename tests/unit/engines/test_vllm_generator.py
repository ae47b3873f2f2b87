"""VllmGenerator against transformers, through weight updates, and when processes die. Real vLLM engines."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engines.base import Completion, Sampling
from engines.config import GeneratorSettings
from engines.vllm.generator import VllmGenerator
from engines.vllm.process import request_seeds
from engines.weight_transfer import SharedMemorySender, read_weights
from infra.errors import CheckpointError, SystemFault
from infra.processes import process_start

SETTINGS = GeneratorSettings(kv_cache_gib=0.1, max_model_len=64, max_num_seqs=32, max_num_batched_tokens=512)
PROMPTS = [[2 + (7 * i + j) % 90 for j in range(3 + i % 5)] for i in range(12)]
GREEDY = Sampling(temperature=0.0, max_tokens=10)


def save_llama(folder: Path, seed: int, tied: bool = True, layers: int = 2) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,  # vLLM on CPU wants heads of 32 or more
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("generator")
    return {
        "first": save_llama(base / "first", 0),
        "second": save_llama(base / "second", 1),
        "untied": save_llama(base / "untied", 2, tied=False),
        "untied2": save_llama(base / "untied2", 3, tied=False),
        "deeper": save_llama(base / "deeper", 4, layers=3),
    }


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[VllmGenerator]:
    generator = VllmGenerator(folders["first"], SETTINGS, version="v0")
    yield generator
    generator.close()


@pytest.fixture
def generator(engine: VllmGenerator, folders: dict[str, Path]) -> VllmGenerator:
    """The shared engine with the first model's weights."""
    engine.load_weights(folders["first"], "v0")
    return engine


def assert_samples_of(
    folder: Path, prompts: list[list[int]], groups: list[list[Completion]], temperature: float
) -> None:
    """Log-probs are those of transformers at this temperature; greedy tokens are its argmax (or tie with it)."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
            logp = (logits / (temperature or 1.0)).log_softmax(-1)
            chosen = logp.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=1e-3, rtol=0)
            if temperature == 0:
                assert bool((chosen > logp.max(-1).values - 1e-4).all())


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_and_logprobs_are_the_models(
    generator: VllmGenerator, folders: dict[str, Path], temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, max_tokens=10, n=2, seed=5)
    groups = generator.generate(PROMPTS, sampling)
    assert [len(group) for group in groups] == [2] * len(PROMPTS)
    assert all(len(c.token_ids) == 10 and c.finish_reason == "length" for group in groups for c in group)
    assert_samples_of(folders["first"], PROMPTS, groups, temperature)


def test_stop_token_ends_an_answer_and_stays_in_it(generator: VllmGenerator) -> None:
    answer = generator.generate(PROMPTS[:1], GREEDY)[0][0]
    stop = answer.token_ids[4]
    stopped = generator.generate(PROMPTS[:1], Sampling(temperature=0.0, max_tokens=10, stop_token_ids=(stop,)))[0][0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == answer.token_ids[: answer.token_ids.index(stop) + 1]
    assert len(stopped.logprobs) == len(stopped.token_ids)


def test_seeded_answers_do_not_depend_on_order_or_history(generator: VllmGenerator) -> None:
    sampling = Sampling(max_tokens=8, n=3, seed=11)
    forward = generator.generate(PROMPTS, sampling)
    generator.generate(PROMPTS[:3], Sampling(max_tokens=5))
    backward = generator.generate(PROMPTS[::-1], sampling)[::-1]
    parts = generator.generate(PROMPTS[:5], sampling) + generator.generate(PROMPTS[5:], sampling)
    tokens = [[c.token_ids for c in group] for group in forward]
    assert tokens == [[c.token_ids for c in group] for group in backward]
    assert tokens == [[c.token_ids for c in group] for group in parts]
    assert all(len(set(group)) == 3 for group in tokens), "the answers of one prompt must differ"
    other = generator.generate(PROMPTS, Sampling(max_tokens=8, n=3, seed=12))
    assert tokens != [[c.token_ids for c in group] for group in other]


def test_equal_prompts_get_different_seeds() -> None:
    seeds = request_seeds([[1, 2], [1, 2], [3]], seed=1, repeats=2)
    assert len(set(seeds)) == 6
    assert request_seeds([[3], [1, 2]], seed=1, repeats=2) == seeds[4:] + seeds[:2]


def test_published_weights_replace_everything(
    generator: VllmGenerator, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Tied embeddings: the head's packed copy must follow."""
    sender = SharedMemorySender(tmp_path)
    before = generator.generate(PROMPTS, GREEDY)
    update = sender.publish(read_weights(folders["second"]), "v1")
    generator.update_weights(update)
    assert generator.weight_version == "v1"
    after = generator.generate(PROMPTS, GREEDY)
    assert {c.weight_version for group in after for c in group} == {"v1"}
    assert_samples_of(folders["second"], PROMPTS, after, 0.0)
    generator.update_weights(sender.publish(read_weights(folders["first"]), "v2"))
    again = generator.generate(PROMPTS, GREEDY)
    assert [[(c.token_ids, c.logprobs) for c in g] for g in again] == [
        [(c.token_ids, c.logprobs) for c in g] for g in before
    ]
    sender.close()


def test_other_architectures_are_refused_and_change_nothing(
    generator: VllmGenerator, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = generator.generate(PROMPTS[:2], GREEDY)
    with pytest.raises(CheckpointError, match=r"unknown model\.layers\.2"):
        generator.load_weights(folders["deeper"], "bad")
    sender = SharedMemorySender(tmp_path)
    whole = dict(read_weights(folders["second"]))
    whole.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"missing model\.norm\.weight"):
        generator.update_weights(sender.publish(whole.items(), "bad"))
    update = sender.publish(read_weights(folders["second"]), "gone")
    sender.close()
    with pytest.raises(CheckpointError, match="not readable"):
        generator.update_weights(update)
    assert generator.generate(PROMPTS[:2], GREEDY) == before
    assert generator.weight_version == "v0"


def test_bad_prompts_are_value_errors(generator: VllmGenerator) -> None:
    for prompt, text in [([], "0 tokens"), ([2] * 64, "64 tokens"), ([97], "outside the vocabulary")]:
        with pytest.raises(ValueError, match=text):
            generator.generate([[2, 3], prompt], GREEDY)
    longest = generator.generate([[2] * 63], GREEDY)[0][0]
    assert (len(longest.token_ids), longest.finish_reason) == (1, "length")
    generator.health()


PARENT = """
import sys, time
from pathlib import Path
from engines.base import Sampling
from engines.config import GeneratorSettings
from engines.vllm.generator import VllmGenerator
first, second = map(Path, sys.argv[1:])
generator = VllmGenerator(first, GeneratorSettings.model_validate_json(sys.stdin.readline()), "v0")
generator.load_weights(second, "v1")
answers = generator.generate([[5, 6, 7]], Sampling(temperature=0.0, max_tokens=10))
print(generator.pid, *answers[0][0].token_ids, flush=True)
time.sleep(600)
"""


def test_engine_dies_with_a_killed_parent(folders: dict[str, Path]) -> None:
    """The parent also carries the untied case: its engine swaps weights before the kill."""
    command = [sys.executable, "-c", PARENT, str(folders["untied"]), str(folders["untied2"])]
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, stdin=-1, stdout=-1, env=environment, text=True) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(SETTINGS.model_dump_json() + "\n")
        parent.stdin.flush()
        pid, *tokens = map(int, parent.stdout.readline().split())
        parent.kill()
    model = AutoModelForCausalLM.from_pretrained(folders["untied2"])
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert tokens == expected[0, 3:].tolist()
    deadline = time.monotonic() + 60
    while process_start(pid) is not None:
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.02)


def test_a_killed_engine_is_a_system_fault(engine: VllmGenerator) -> None:
    """Last, because it ends the shared engine."""
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(SystemFault, match="died"):
        engine.generate(PROMPTS, GREEDY)
    with pytest.raises(SystemFault):
        engine.health()
    engine.close()
    assert not Path(f"/proc/{engine.pid}").exists()
