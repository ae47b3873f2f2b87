"""The state of torch's random number generators as JSON."""

import base64

import torch


def capture(device: torch.device) -> dict[str, str]:
    """Of the host and, for a GPU, of `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(state.numpy().tobytes()).decode() for kind, state in states.items()}


def apply(states: dict[str, str], device: torch.device) -> None:
    """Go on where `capture` was called."""
    tensors = {
        kind: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for kind, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
