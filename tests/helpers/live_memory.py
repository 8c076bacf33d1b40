"""Bytes of tensors alive while torch code runs, at most."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveMemory(TorchDispatchMode):
    """Counts storages made inside the block: `peak_bytes`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak_bytes = 0
        self._seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage()._cdata
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), known)
        return out

    def _count(self, storage, known):
        key = storage._cdata
        if key in self._seen or key in known:
            return
        size = storage.nbytes()
        self._seen[key] = size
        weakref.finalize(storage, self._free, key)
        self.live += size
        self.peak_bytes = max(self.peak_bytes, self.live)

    def _free(self, key):
        self.live -= self._seen.pop(key)
