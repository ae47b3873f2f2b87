"""The same computation on all replicas, so that one that computes wrongly stands out.

Every rank takes part: the replicas bring one sample of the data through the network, forward and (on a CPU) backward,
and each digests what it computed by itself: the loss, its own gradients before they are summed, and the gradient of the
first hidden states, which all others flowed into. From equal weights and on equal processors these are equal bits. On a
GPU backward may add up in any order, so there only the outputs are taken; so it is with pipeline stages.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash

from engines.base import Batch, LossFn
from engines.elastic.sharded_adamw import local
from engines.elastic.torch_learner import TorchLearner


def replay(learner: TorchLearner, sample: Batch, loss_fn: LossFn) -> str:
    """(collective) Digest of what this rank computes of `sample` ([1, T] each, the same on all replicas)."""
    digest = xxhash.xxh3_64()
    staged, on_cpu = learner.ranks.stages > 1, learner.ranks.device.type == "cpu"
    with ExitStack() as hooks:
        last = learner.module.register_forward_hook(lambda module, inputs, output: _add(digest, output))
        hooks.callback(last.remove)
        if staged or not on_cpu:
            learner.evaluate([sample], lambda module, batch: loss_fn(module, batch)[0].detach())
            return digest.hexdigest()
        first = learner.module.tok_embeddings.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda module, inputs, output: _on_gradient(digest, output)
        )
        hooks.callback(first.remove)
        learner.module.train()
        loss_fn(learner.module, sample)[0].backward()
    if not learner.reduces_gradients:
        for parameter in learner.optimizer.parameters.values():
            if parameter.grad is not None:
                _add(digest, parameter.grad)
    learner.optimizer.clear_gradients()
    return digest.hexdigest()


def processor_kind(device: torch.device) -> str:
    """Machines of one kind compute the same bits."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _on_gradient(digest: Any, output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: _add(digest, gradient))


def _add(digest: Any, tensor: torch.Tensor) -> None:
    own = local(tensor).detach().contiguous().reshape(-1)
    if own.device.type == "cpu":
        digest.update(own.view(torch.uint8).numpy())
    else:  # added up where it lies: logits are large
        digest.update(str(own.view(torch.uint8).sum(dtype=torch.int64).item()))
