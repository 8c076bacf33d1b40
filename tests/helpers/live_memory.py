"""Bytes of tensors alive while torch code runs, and at which operation they were most."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveMemory(TorchDispatchMode):
    """Counts storages made inside the block: `peak_bytes`, and `peak_at`, an operation's name."""

    def __init__(self):
        super().__init__()
        self.live = self.peak_bytes = 0
        self.peak_at = ""
        self._seen = {}
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage()._cdata
            for t in tree_flatten((args, kwargs))[0]
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), known, str(func))
        return out

    def _count(self, storage, known, name):
        key = storage._cdata
        if key in self._seen or key in known:
            return
        size = storage.nbytes()
        self._seen[key] = size
        weakref.finalize(storage, self._free, key)
        self.live += size
        self.log.append((self.live, size, name))
        if self.live > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live, name

    def _free(self, key):
        self.live -= self._seen.pop(key)
