"""The folders that benchmarks of several ranks load."""

import random_folder
import tensor_parallel
import torch

import halfweight


def test_a_random_folder_is_a_model_whose_logits_are_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(random_folder, "BLOCK_BYTES", 1000)
    random_folder.write_random(tensor_parallel.SMALL, tmp_path / "model")
    model = halfweight.load(tmp_path / "model")
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 9, 3000]])).logits.float()
    assert logits.isfinite().all()
    assert logits.std() > 0
    written = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    random_folder.write_random(tensor_parallel.SMALL, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").stat().st_mtime_ns == written
