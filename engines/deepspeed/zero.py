"""What state and snapshots share: the parts of a model in training, and its Adam moments under every ZeRO stage."""

from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ZeroModel:
    """One rank's part of a model in training. `optimizer` is DeepSpeed's; at stage 0 in fp32 it is torch's AdamW."""

    module: Any  # a torch.nn.Module; DeepSpeed adds attributes to its parameters
    optimizer: Any
    stage: int
    rank: int

    def plain_state(self) -> Any:
        """The Adam state by parameter at stage 0 in fp32, where DeepSpeed puts nothing between; else None."""
        return self.optimizer.state if isinstance(self.optimizer, torch.optim.AdamW) else None

    def adam(self) -> Any:
        """torch's own optimizer."""
        return self.optimizer if isinstance(self.optimizer, torch.optim.AdamW) else self.optimizer.optimizer

    def make_moments(self) -> None:
        """Adam makes its moments at the first step, and ZeRO links them to parameters in the middle of it; do both
        now."""
        adam = self.adam()
        flat = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3 empties its parameter groups
        for parameter in flat if flat is not None else [p for group in adam.param_groups for p in group["params"]]:
            state = adam.state[parameter]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(parameter)
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def set_adam_step(self, step: int) -> None:
        for state in self.adam().state.values():
            state["step"] = torch.tensor(float(step), dtype=torch.float32)
