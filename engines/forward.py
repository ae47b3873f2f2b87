"""How losses and scorers call a model: micro-batch in, logits or values out.

Works on any Hugging Face causal LM, on `ScalarModel`, and on a DeepSpeed engine around either.
"""

from typing import Any

import torch

from data.packing import block_causal_mask
from engines.base import Batch


def logits(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """[B, T, V] next-token logits in the model's dtype. Rows at padding are meaningless."""
    return module(**model_inputs(batch), use_cache=False).logits


def values(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """[B, T] fp32 scalar per token: a reward model's score so far, or a critic's value. Meaningless at padding."""
    return module(**model_inputs(batch))


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """What the network is called with.

    Padding on the right needs no mask at all: causal attention never looks right. Packed rows get a block-diagonal
    mask [B, 1, T, T] from `segment_ids` (0 = padding).

    Raises:
        ValueError: `attention_mask` pads on the left, or `segment_ids` come without `position_ids`.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "segment_ids" in batch:
        if "position_ids" not in batch:
            raise ValueError("a packed micro-batch has segment_ids and position_ids")
        inputs["position_ids"] = batch["position_ids"]
        inputs["attention_mask"] = block_causal_mask(batch["segment_ids"])
    elif "attention_mask" in batch:
        mask = batch["attention_mask"]
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ValueError("attention_mask must pad on the right")
    return inputs


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The micro-batch with every tensor on `device`."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


class ScalarModel(torch.nn.Module):
    """A decoder with one number per token: reward models and critics.

    Its tensors carry the names of transformers' `...ForSequenceClassification` (`model.*`, `score.weight`), whose
    `num_labels=1` form loads a saved folder and gives the last token's value.
    """

    def __init__(self, model: torch.nn.Module, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.score = torch.nn.Linear(hidden_size, 1, bias=False, dtype=dtype)

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Inputs of the decoder -> [B, T] fp32."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
        return self.score(hidden).squeeze(-1).float()
