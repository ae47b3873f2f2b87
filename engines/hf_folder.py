"""Models from and to Hugging Face folders: config.json, safetensors, and the files that travel with them."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from engines.chat import write_chat
from engines.forward import ScalarModel
from engines.quiet import one_line, quiet_transformers
from infra.errors import CheckpointError, RecuaError
from models.files import read_object, refuse_adapter, refuse_pointer, whole_folder
from models.weights import write_shards

Head = Literal["lm", "scalar"]

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Files of a model folder that travel with its weights as they are, beside licences and generation_config.json."""
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""What those who pass a model on must pass on too."""
ATTENTION = "sdpa"
"""Which of transformers' attentions models are loaded with."""
log = logging.getLogger(__name__)


def load_model(folder: Path, head: Head, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """The folder's causal LM, or its decoder under a scalar head (a new one if the folder holds none).

    A new head is drawn from N(0, 1/(hidden+1)) with `seed`, the same on every rank.

    Raises:
        CheckpointError: no model there, or tensors that are missing or of the wrong shape.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model folder in Hugging Face form is needed")
    if head == "lm":
        return _from_pretrained("AutoModelForCausalLM", folder, dtype)
    model = _from_pretrained("AutoModel", folder, dtype)
    scalar = ScalarModel(model, model.config.hidden_size, dtype)
    saved = _read_tensor(folder, "score.weight")
    with torch.no_grad():
        if saved is not None:
            scalar.score.weight.copy_(saved)
        else:
            generator = torch.Generator().manual_seed(seed)
            draw = torch.randn(scalar.score.weight.shape, generator=generator)
            scalar.score.weight.copy_(draw / (model.config.hidden_size + 1) ** 0.5)
    return scalar


def _from_pretrained(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    import transformers

    loader = getattr(transformers, kind)
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(
                folder, dtype=dtype, local_files_only=True, attn_implementation=ATTENTION, output_loading_info=True
            )
    except Exception as error:  # whatever the folder makes of it
        raise CheckpointError(f"{folder}: {one_line(error)}") from error
    if report["missing_keys"]:
        raise CheckpointError(f"{folder}: missing tensors: {', '.join(sorted(report['missing_keys'])[:5])}")
    return model


def _read_tensor(folder: Path, name: str) -> torch.Tensor | None:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            if name in reader.keys():  # noqa: SIM118  (safe_open is no mapping)
                return reader.get_tensor(name)
    return None


def refuse_parts(folder: Path) -> None:
    """Raises CheckpointError where a folder holds less than a model: an adapter alone, or pointers and links to
    files that are not here."""
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
    for file in sorted(folder.iterdir()):
        if not file.is_dir():
            refuse_pointer(file)


def check_configs(folder: Path) -> Any:
    """Whether transformers reads generation_config.json and config.json, and builds that model.

    Returns the model, without memory for its weights.

    Raises:
        CheckpointError: names the file.
    """
    import transformers

    def use(name: str, read: Callable[[], Any]) -> Any:
        try:
            with quiet_transformers():
                return read()
        except Exception as error:  # whatever the file's content makes of it
            raise CheckpointError(f"{folder / name}: transformers cannot use it: {one_line(error)}") from error

    def build() -> Any:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, attn_implementation=ATTENTION)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)

    if (folder / "generation_config.json").is_file():
        read_object(folder / "generation_config.json")
        reader = transformers.GenerationConfig
        use("generation_config.json", lambda: reader.from_pretrained(folder, local_files_only=True))
    return use("config.json", build)


def save_model(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: Path | None, folder: Path) -> None:
    """Write `tensors` (full, HF names) and `model`'s config into `folder`; `source` lends what travels with a model.

    The folder appears whole or not at all. Weights come first, and whatever is wrong with what travels beside them does
    not keep them from being saved: it is logged, and left out.
    """
    with whole_folder(folder) as draft:
        if isinstance(model, ScalarModel):
            _write_scalar(model, tensors, draft)
        else:
            _write_causal(model, tensors, draft)
        for add in (_copy_companions, write_chat) if source is not None else ():
            assert source is not None
            try:
                add(source, draft)
            except (OSError, ValueError, RecuaError) as error:
                log.warning("%s is saved without all that travels with its model: %s", folder, error)


def _write_causal(model: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """As `save_pretrained` does, but for its refusals: it will not save what it loaded with only a warning."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    published = revert_weight_conversion(model, remove_tied_weights_from_state_dict(dict(tensors), model))
    write_shards(published.items(), folder)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json", use_diff=True)


def _write_scalar(model: ScalarModel, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    backbone: Any = model.model
    config = backbone.config.to_dict()
    config.pop("_name_or_path", None)  # where this copy came from: equal models must have equal files
    family = type(backbone).__name__.removesuffix("Model")
    config |= {
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "dtype": str(model.score.weight.dtype).removeprefix("torch."),
    }
    write_shards(tensors.items(), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def copy_files(patterns: Sequence[str], source: Path, folder: Path) -> None:
    """Copy what is there of `source`'s files into `folder`."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


def _copy_companions(source: Path, folder: Path) -> None:
    copy_files([*LICENCES, *COMPANIONS], source, folder)
    if (generation := source / "generation_config.json").is_file():
        read_object(generation)  # a broken one would keep others from loading the model
        shutil.copyfile(generation, folder / generation.name)
