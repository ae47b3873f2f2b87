"""AdamW, and the gradient's norm, on this rank's own part of every parameter.

The optimizer works element by element, so it needs no DTensors: on plain local tensors a step has no dispatch to plan,
which after a change of mesh would cost more than everything else (0.2 s for a toy network).
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from algorithms.schedule import parameter_groups
from engines.config import LearnerSettings
from models.llama import Llama, whole_name
from models.parallelize import is_sharded

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """For a module whose parameters are plain tensors, the same on all ranks, or DTensors.

    Args:
        world_size: ranks whose parts together are the gradient; a part that several hold counts once.
        stages: of the pipeline; each holds other parameters, except a tied matrix, which both ends hold.
    """

    def __init__(self, module: Llama, settings: LearnerSettings, world_size: int, stages: int = 1) -> None:
        config = module.config
        self.parameters = {whole_name(config, name): p for name, p in module.named_parameters() if p.requires_grad}
        self._world_size, self._max_norm = world_size, settings.max_grad_norm
        self._stage_size = world_size // stages
        tied = config.tied and stages > 1 and "tok_embeddings.weight" in self.parameters
        self.twin = "tok_embeddings.weight" if tied else None
        """The parameter that another stage holds too."""
        self._locals = {name: local(p.detach()).requires_grad_() for name, p in self.parameters.items()}
        self._groups = parameter_groups(self._locals.items(), settings.weight_decay)
        self._betas, self._eps = settings.betas, settings.eps
        self._state = {
            part: {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                **{moment: torch.zeros_like(part) for moment in MOMENTS},
            }
            for part in self._locals.values()
        }

    @property
    def updates(self) -> float:
        """Steps that were applied: Adam's bias correction."""
        first = next(iter(self._locals.values()))
        return float(self._state[first]["step"].item())

    @updates.setter
    def updates(self, value: float) -> None:
        for part in self._locals.values():
            self._state[part]["step"].fill_(value)

    def gradients(self) -> list[torch.Tensor]:
        """This rank's parts of the gradients. Partial sums, which sequence parallelism leaves of norms', are added."""
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            placed: Any = parameter
            if gradient is not None and is_sharded(gradient) and gradient.placements != placed.placements:
                parameter.grad = gradient = gradient.redistribute(placements=placed.placements)
            self._locals[name].grad = None if gradient is None else local(gradient)
        return [part.grad for part in self._locals.values() if part.grad is not None]

    def gradient(self, name: str) -> torch.Tensor:
        """This rank's part of one parameter's gradient: the live memory."""
        self.gradients()
        gradient = self._locals[name].grad
        assert gradient is not None, f"{name} has no gradient"
        return gradient

    @torch.no_grad()
    def clip(self) -> float:
        """(collective) Scale the gradient to the longest allowed norm if it is longer; returns its norm before."""
        gradients = self.gradients()
        held = [self._holders(name) for name, part in self._locals.items() if part.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        square = (norms.square() / torch.tensor(held, dtype=torch.float64, device=norms.device)).sum()
        if self._world_size > 1:
            dist.all_reduce(square)
        norm = math.sqrt(square.item()) if math.isfinite(square.item()) else math.inf
        if self._max_norm > 0 and math.isfinite(norm) and norm > self._max_norm:
            torch._foreach_mul_(gradients, self._max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """One step of AdamW. The function alone: torch's optimizer object would import its compiler, 0.7 s of CPU."""
        for group in self._groups:
            parts = [part for part in group["params"] if part.grad is not None]
            states = [self._state[part] for part in parts]
            adamw(
                parts,
                [part.grad for part in parts],
                exp_avgs=[state["exp_avg"] for state in states],
                exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=learning_rate,
                weight_decay=group["weight_decay"],
                eps=self._eps,
                maximize=False,
            )

    def clear_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self._locals[name].grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by global name, as DTensors where the parameters are; the live memory."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            state[f"model.{name}"] = parameter.detach()
            for moment in MOMENTS:
                part = self._state[self._locals[name]][moment]
                state[f"{moment}.{name}"] = _like(part, parameter)
        return state

    def close(self) -> None:
        self._state.clear()
        self._groups.clear()
        self._locals.clear()
        self.parameters.clear()

    def _holders(self, name: str) -> int:
        """How many ranks hold the same part of a parameter."""
        parameter: Any = self.parameters[name]
        ranks = self._stage_size * (2 if name == self.twin else 1)
        if not is_sharded(parameter):
            return ranks
        mesh = parameter.device_mesh
        parts = [mesh.size(i) for i, place in enumerate(parameter.placements) if not place.is_replicate()]
        return ranks // math.prod(parts)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
