"""Steps on a GPU whose logits are the same to the bit however a request runs.

A model takes them where its products do not depend on the batch (`Backend.is_invariant`). What is
between the products has a program a token anyway. What is left is attention: a query's sums depend
on its position alone, because

    every token is in its page before it is attended, in decoding too, and a query meets what the
    page holds, rounded to INT8 or not;
    one compiled kernel, that of drafts, takes all queries in tiles of FEW_TOKENS, adds the pages of
    a sequence from the first on, and is never cut into parts;
    what a query must not see adds exact zeros: another query's pages in its tile change nothing.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.gpu_attention import PagedAttention, WorkList
from halfweight.engine.runners.gpu_layers import Layer, Product
from halfweight.kernels.operations import backend
from halfweight.memory.engine_memory import FEW_TOKENS
from halfweight.model.modules import QuantizedLinear


class InvariantAttention(PagedAttention):
    """Attention whose bits for a query depend on its position and its sequence's tokens alone."""

    is_invariant = True
    num_decoding_at_once: ClassVar[int] = 0
    num_tiles_at_once: ClassVar[int] = 0
    tile_queries: ClassVar[int] = FEW_TOKENS

    def few(self, layer: Layer, queries: Tensor, out: Tensor, work: WorkList, most: int) -> None:
        """See PagedAttention; whatever `most`, the kernel is that of tiles."""
        super().few(layer, queries, out, work, FEW_TOKENS)

    def tiles(
        self, layer: Layer, queries: Tensor, out: Tensor, work: WorkList, sources: Tensor | None
    ) -> None:
        """See PagedAttention; INT8 pages are read as they lie, without `sources`."""
        assert sources is None
        self.few(layer, queries, out, work, FEW_TOKENS)


def has_invariant_products(model: PreTrainedModel) -> bool:
    """Whether all products of INT8 linears are the same for a row in any batch."""
    linears = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return all(backend(linear.backend_name).is_invariant for linear in linears)


def row_by_row(product: Product) -> Product:
    """A vendor's product, which takes another kernel for another batch, of one row at a time."""
    return lambda x: torch.cat([product(x[i : i + 1]) for i in range(len(x))])
