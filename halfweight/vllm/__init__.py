"""A plug-in for vLLM: INT8 linears, embeddings and heads of our files, multiplied by our kernels.

In: vLLM's layers as it builds and loads them. Out: the same layers, their bytes as the file has
them, their products from `halfweight.kernels`. vLLM finds `register` by its entry point group
`vllm.general_plugins` and calls it in each of its processes. First file: plugin.py.

    plugin.py     what is registered with vLLM
    kernel.py     linear layers
    embedding.py  embeddings, and output heads tied to them
    config.py     which layer is held how
    layers.py     vLLM's vocabulary layers, which know too little
    weights.py    bytes and scales as our kernels take them

Off by HALFWEIGHT_VLLM=0, or by vLLM's own VLLM_PLUGINS without `halfweight` in it. It works with
vLLM from LOWEST to HIGHEST_TESTED, and with later ones as long as they have what it hooks into.

May import: errors, quantization, kernels. Nothing else imports vLLM, and nothing imports this room.
"""

from __future__ import annotations

import logging
import os
import re

LOWEST = (0, 22)
HIGHEST_TESTED = (0, 32)
"""Versions of vLLM as (major, minor): the lowest that has the hooks, the highest that was run."""

log = logging.getLogger("vllm.halfweight")
"""Below vLLM's logger, which alone has a handler in vLLM's processes."""


def register() -> None:
    """Register kernel, config and layers with vLLM; may be called again.

    Where vLLM is too old, or lacks a hook, one line says so and vLLM runs as it is.
    """
    if os.environ.get("HALFWEIGHT_VLLM") == "0":
        log.info("halfweight: off by HALFWEIGHT_VLLM=0")
        return
    import vllm

    if unfit := unfit_version(vllm.__version__):
        log.warning("halfweight: %s; vLLM runs without it", unfit)
        return
    try:
        from halfweight.vllm import plugin

        plugin.install()
        if (found := _numbers(vllm.__version__)) is not None and found > HIGHEST_TESTED:
            log.info("halfweight: vLLM %s is later than all that were tested", vllm.__version__)
    except (ImportError, AttributeError) as error:
        log.warning(
            "halfweight: vLLM %s lacks what the plug-in hooks into (%s); vLLM runs without it",
            vllm.__version__,
            error,
        )


def _numbers(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def unfit_version(version: str) -> str | None:
    """Why the plug-in does not work with vLLM of this version, or None."""
    found = _numbers(version)
    if found is None or found >= LOWEST:  # without numbers: built from a commit
        return None
    return f"vLLM {version} is too old, {'.'.join(map(str, LOWEST))} or later is needed"
