"""Log-probabilities of tokens, aligned with the tokens themselves.

Convention of the whole package: a value at position t belongs to *token t*, that is, it was computed from the logits
at position t - 1. Position 0 has no prediction and holds 0; masks must be 0 there. All results are fp32.
"""

import torch
import torch.nn.functional as F


def token_logprobs(logits: torch.Tensor, input_ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p(token t | tokens before t), fp32, differentiable.

    Args:
        logits: [B, T, V] in any floating dtype; logits[:, t] predicts token t + 1.
        input_ids: [B, T].
        temperature: divides the logits, for comparison with a sampler that did the same; > 0.

    Returns:
        [B, T]; position 0 is 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    predictions = logits[:, :-1].float()
    if temperature != 1.0:
        predictions = predictions / temperature
    targets = input_ids[:, 1:]
    found = -F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none")
    return F.pad(found.view(targets.shape), (1, 0))


def align_values(values: torch.Tensor) -> torch.Tensor:
    """A critic's outputs [B, T] (position t has read token t) -> V of the state in which token t is chosen, [B, T].

    Position 0 is 0; the output after the last token is dropped.
    """
    return F.pad(values[:, :-1].float(), (1, 0))
