"""transformers' Auto classes and pipelines take folders in INT8: what `import halfweight` arranges.

transformers chooses who loads a quantized folder by the `quant_method` of its config.json, from a
table in `transformers.quantizers.auto`. Ours say "compressed-tensors", as do the files of others.
So that row of the table is wrapped: a description of symmetric 8-bit groups goes to us, every other
to transformers' own class, untouched. HALFWEIGHT_TRANSFORMERS=0 leaves all of them to it.

`import halfweight` stays light: where transformers has not been imported yet, the row is wrapped
when it is, and neither torch nor transformers is imported for that. Refused: an import of our own
to be remembered (`import halfweight.transformers`), which a script that only names a folder, such
as `pipeline(model="OUT")`, would have no other reason to know.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE_MODULE = "transformers.quantizers.auto"
QUANT_METHOD = "compressed-tensors"
SWITCH = "HALFWEIGHT_TRANSFORMERS"


def register() -> None:
    """Wrap the row now if transformers has its table already, else when it is imported."""
    table_module = sys.modules.get(TABLE_MODULE)
    if table_module is not None:
        _wrap_row(table_module)
    else:
        sys.meta_path.insert(0, _OnImport())


def is_for_us(declared: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` describes weights that our modules hold as they are."""
    groups = declared.get("config_groups") or {}
    return (
        os.environ.get(SWITCH) != "0"
        and declared.get("quant_method") == QUANT_METHOD
        and declared.get("format") == "pack-quantized"
        and not declared.get("kv_cache_scheme")
        and bool(groups)
        and all(isinstance(group, Mapping) and _is_int8(group) for group in groups.values())
    )


def _is_int8(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights") or {}
    return (
        tuple(weights.get(key) for key in ("num_bits", "type", "symmetric")) == (8, "int", True)
        and weights.get("strategy") in ("group", "channel")
        and not weights.get("actorder")
        and not group.get("input_activations")
        and not group.get("output_activations")
    )


class _OnImport:
    """Finds the module with the table as Python would, and wraps its row once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_wrap(module: ModuleType) -> None:
                run(module)
                _wrap_row(module)

            spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap_row(table_module: ModuleType) -> None:
    table = table_module.AUTO_QUANTIZATION_CONFIG_MAPPING
    theirs: Any = table[QUANT_METHOD]

    class HalfweightFirst(theirs):  # type: ignore[misc]
        """transformers' own class, but for descriptions that are for us."""

        @classmethod
        def from_dict(cls, declared: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not args and not kwargs and is_for_us(declared):
                ours = importlib.import_module("halfweight.model.auto_loading")
                return ours.HalfweightFolderConfig.from_dict(declared)
            return theirs.from_dict(declared, *args, **kwargs)

    table[QUANT_METHOD] = HalfweightFirst
