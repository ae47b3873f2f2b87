"""What runs inside vLLM's workers: the registered "shared_memory" weight-transfer engine, and a worker extension.

vLLM imports this module in every worker through `worker_extension_cls`, before it builds the weight-transfer engine.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from engines.weight_transfer import read_weights


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """`path` of a safetensors file, or of a model folder with several."""

    path: str
    names: list[str] = field(default_factory=list)


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Reads the tensors from a memory-mapped file and reloads the model layer by layer, in place."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        return None

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        model: Any = self.model
        model.load_weights(read_weights(Path(update_info.path)))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_head(self.model)

    def shutdown(self) -> None:
        return None


def refresh_head(model: torch.nn.Module) -> None:
    """Repack the output head.

    On CPU the head multiplies with a packed copy of its weight. With tied embeddings a reload goes through the
    embedding layer and leaves that copy as it was, silently.
    """
    head = getattr(model, "lm_head", None)
    quant_method = getattr(head, "quant_method", None)
    if head is not None and quant_method is not None:
        quant_method.process_weights_after_loading(head)


class WorkerExtension:
    """Mixed into vLLM's worker class: its methods answer `collective_rpc`."""

    def reload_from_folder(self, folder: str) -> None:
        """Load a saved model of the same architecture in place, whatever the transfer backend."""
        worker: Any = self
        worker.reload_weights(weights_path=folder)
        refresh_head(worker.get_model())


# Registering is this module's purpose: vLLM offers no other hook that runs before a worker builds its engine.
WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
