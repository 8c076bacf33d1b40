"""What is fetched of a Hub repository: the model's files, its terms, and nothing else."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from tiny import make_llama

import halfweight
from halfweight.checkpoint.headers import read_headers, resolve

OTHERS = (
    "original/consolidated.00.safetensors",
    "original/params.json",
    "checkpoint-500/model.safetensors",
    "vae/config.json",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "modeling_own.py",
    "figure.png",
)
TERMS = ("LICENSE.txt", "NOTICE", "USE_POLICY.md")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository to fetch from; returns (repository, the folder that files are fetched to)."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    cache.mkdir()

    def fetch(name, *, allow_patterns, ignore_patterns):
        assert name == "org/name"
        files = [str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()]
        chosen = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in chosen:
            (cache / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return repository, cache


def add(repository, names):
    for name in names:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")


@pytest.mark.parametrize("shard_size", ["60KB", "100MB"])
def test_only_the_models_files_come_with_its_terms(hub, shard_size):
    repository, cache = hub
    make_llama(repository, shard_size=shard_size)
    wanted = {p.name for p in repository.iterdir()} | set(TERMS)
    add(repository, (*OTHERS, *TERMS))
    assert resolve("org/name") == cache
    assert {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()} == wanted
    assert read_headers(cache).num_bytes == sum(
        t.info.num_bytes for t in read_headers(cache).tensors
    )


def test_a_single_file_by_another_name_is_fetched(hub):
    repository, cache = hub
    make_llama(repository, shard_size="100MB")
    (repository / "model.safetensors").rename(repository / "weights.safetensors")
    assert resolve("org/name") == cache
    assert (cache / "weights.safetensors").exists()


def test_terms_travel_with_the_quantized_weights(hub, tmp_path):
    repository, _ = hub
    make_llama(repository)
    add(repository, TERMS)
    halfweight.quantize("org/name", tmp_path / "out")
    for name in TERMS:
        assert (tmp_path / "out" / name).read_text() == "{}"
