"""A folder that we saved, in plain vLLM: the greedy tokens of transformers, our chat ids, and our stop tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from test_tokenizers import CORPUS
from transformers import AutoModelForCausalLM

from models.chat import render
from models.llama import Llama, LlamaConfig, RopeScaling
from models.tokenizers import train_bpe
from models.weights import save_hf

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    task = json.load(open(sys.argv[1]))
    llm = LLM(task["folder"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    greedy = SamplingParams(temperature=0, max_tokens=24)
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    answers = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy)]
    chats = llm.chat(task["conversations"], SamplingParams(temperature=0, max_tokens=1))
    stops = []
    for token in task["stop_ids"]:
        forced = SamplingParams(temperature=0, max_tokens=8, logit_bias={token: 100.0})
        result = llm.generate(prompts[:1], forced)[0].outputs[0]
        stops.append([result.finish_reason, list(result.token_ids)])
    answer = {"greedy": answers, "chat": [list(chat.prompt_token_ids) for chat in chats], "stops": stops}
    json.dump(answer, open(sys.argv[2], "w"))
"""


def test_plain_vllm_generates_chats_and_stops_as_saved(tmp_path: Path) -> None:
    """One engine start, so one model that has everything at once: GQA, tied, scaled RoPE, several shards."""
    tokenizer = train_bpe(CORPUS, 400)
    scaling = RopeScaling(factor=8.0, original_context=64)
    config = LlamaConfig(128, 2, 4, 2, 256, tokenizer.vocab_size, 512, rope_theta=5e5, rope_scaling=scaling, tied=True)
    model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    folder = tmp_path / "model"
    save_hf(model, config, folder, tokenizer, shard_bytes=400_000)
    conversations = [
        [{"role": "user", "content": "over the hills"}],
        [
            {"role": "system", "content": " Be brief.\n"},
            {"role": "user", "content": "2 + 3"},
            {"role": "assistant", "content": "5"},
            {"role": "user", "content": "and 12?\n\nWhy"},
        ],
    ]
    prompts = [render(messages, tokenizer, add_generation_prompt=True) for messages in conversations]
    prompts.append(torch.randint(0, 256, (150,), generator=generator).tolist())  # past the original context
    task = {"folder": str(folder), "prompts": prompts, "conversations": conversations, "stop_ids": tokenizer.stop_ids}
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "task.json"), str(tmp_path / "answer.json")]
    run = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for ids, tokens in zip(prompts, answer["greedy"], strict=True):
        expected = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24)
        assert tokens == expected[0, len(ids) :].tolist()
    assert answer["chat"] == prompts[:2]
    assert answer["stops"] == [["stop", [token]] for token in tokenizer.stop_ids]
