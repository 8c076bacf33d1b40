"""`from_pretrained` of a folder in INT8: transformers' own loader, given our tensors.

`AutoModelForCausalLM.from_pretrained("OUT")` goes through transformers from end to end: its config,
its choice of class, its new heads for what a checkpoint lacks, its generation config. Only the
tensors come from us, as in `loading.load`: transformers gets a PackedWeight in place of each weight
in INT8, and our modules take the places where those ended up.

No hook of a quantizer gives the loader its tensors (5.17 to 5.24; there is one for GGUF alone), so
the model's class has its `_load_pretrained_model` wrapped for the one call that follows.
registration.py says which folders come here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer

from halfweight.checkpoint.headers import Checkpoint, own_dtype, quantized_modules, read_headers
from halfweight.errors import CheckpointError, UsageError
from halfweight.kernels.operations import choose_backend
from halfweight.memory.device_memory import out_of_memory, require
from halfweight.model.device_map import one_device
from halfweight.model.loading import (
    LOAD_HINT,
    awaited,
    move_to,
    other_tensors,
    raise_if_refused,
    stored_by_address,
)
from halfweight.model.placement import Options, misshapen, packed_names, place
from halfweight.model.registration import SWITCH
from halfweight.model.transformers_quantizer import HalfweightConfig, HalfweightQuantizer
from halfweight.model.weight_reader import Tally, map_tensors
from halfweight.model.weight_streaming import arriving

METHOD = "halfweight-folder"


@register_quantization_config(METHOD)
class HalfweightFolderConfig(HalfweightConfig):
    """What config.json says of a folder in INT8 (`declared`), on its way through transformers."""

    def __init__(self, **declared: Any) -> None:
        super().__init__()
        self.quant_method = METHOD
        self.declared = declared


@register_quantizer(METHOD)
class FolderQuantizer(HalfweightQuantizer):
    """Loads a folder in INT8 while transformers thinks that it loads 16 bits."""

    _device: torch.device
    _checkpoint: Checkpoint
    _mapped: dict[str, Tensor]

    def update_device_map(self, device_map: Any) -> Any:
        """transformers builds the model on the CPU; its weights then go to the one device asked."""
        self._device = one_device(device_map)
        return None if device_map is None else {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise UsageError(
                "a state dict cannot be loaded by from_pretrained into a model in INT8",
                hint="load the folder itself, then model.load_state_dict(...)",
            )
        self._checkpoint = read_headers(Path(checkpoint_files[0]).parent)
        self._mapped = map_tensors(self._checkpoint)
        _give_tensors_once(type(model))
        return model

    def tensors(self, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
        """What transformers' loader gets in place of the folder's tensors."""
        stored = quantized_modules(self._checkpoint)
        asked = None if str(dtype) == f"torch.{own_dtype(self._checkpoint)}" else dtype
        model.config.dtype = dtype
        packed = awaited(type(model), model.config, stored)
        return other_tensors(self._mapped, stored, asked) | packed

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **options)
        if wrong := misshapen(model):
            raise CheckpointError(
                f"{self._checkpoint.root}: {min(wrong)} has another shape in the model",
                hint="config.json and weights do not belong together: download both again",
            )
        _fill(model, self._checkpoint, self._mapped, self._device)
        model.config.quantization_config = self.quantization_config.declared
        del self._mapped, self._checkpoint
        return model


def _give_tensors_once(kind: Any) -> None:
    """Have the next load of a model of class `kind` read its quantizer's tensors, not its files."""
    if getattr(kind._load_pretrained_model, "gives_tensors", False):
        return  # a load was given up before it came to its tensors
    own = kind.__dict__.get("_load_pretrained_model")

    def load(model: Any, state_dict: Any, files: Any, load_config: Any, *more: Any) -> Any:
        if own is None:
            del kind._load_pretrained_model
        else:
            kind._load_pretrained_model = own
        quantizer = load_config.hf_quantizer
        if isinstance(quantizer, FolderQuantizer):
            state_dict = quantizer.tensors(model, load_config.dtype)
        return kind._load_pretrained_model(model, state_dict, files, load_config, *more)

    load.gives_tensors = True  # type: ignore[attr-defined]
    kind._load_pretrained_model = staticmethod(load)


def _fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    mapped: dict[str, Tensor],
    device: torch.device,
) -> None:
    """Put our modules with their weights into a built model, and all of it onto `device`."""
    used = packed_names(model)
    stored = {name: w for name, w in quantized_modules(checkpoint).items() if name in used}
    options = Options(choose_backend(device))
    what = f"loading {checkpoint.root.name}"
    require(checkpoint.num_bytes, device, what, hint=LOAD_HINT)
    tally = Tally(checkpoint.num_bytes)
    with out_of_memory(device, what, hint=LOAD_HINT):
        with arriving(stored, mapped, device, tally) as weights:
            refused = place(model, weights, options)
        raise_if_refused(checkpoint, refused, f"{SWITCH}=0 leaves the folder to transformers")
        if device.type != "cpu":
            move_to(model, device, stored_by_address(checkpoint, mapped), tally)
