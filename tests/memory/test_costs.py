"""What conversion, loading and serving are said to take, against the code that does them."""

import json
from pathlib import Path

import pytest
from families import save_family

import halfweight
from halfweight.conversion import shard_writer
from halfweight.memory import costs
from halfweight.memory.architecture import architecture
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import Model, footprint
from halfweight.memory.presets import preset
from halfweight.memory.workload import GIB, Workload
from halfweight.model import weight_reader

LLAMA_8B = Model.from_recipe(architecture(preset("llama-3-8b")))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_constants_are_those_of_the_code():
    assert costs.STAGING_BYTES == weight_reader.STAGING_BYTES
    assert costs.CONVERTER_BLOCK_BYTES == shard_writer.BLOCK_BYTES


def test_converters_memory_is_what_was_measured():
    measured = json.loads((RESULTS / "convert.json").read_text())["results"]["peak_bytes"]
    assert costs.conversion(LLAMA_8B, cores=2).ram_bytes == pytest.approx(measured, rel=0.2)


def test_disk_is_the_files_to_the_byte(tmp_path):
    source, out = save_family("qwen3", tmp_path / "src"), tmp_path / "out"
    planned = costs.conversion(planned_model(str(source)))
    halfweight.quantize(source, out)
    files = list(out.glob("*.safetensors"))
    assert planned.disk_bytes == sum(path.stat().st_size for path in files)
    assert planned.num_files == len(files)


def test_time_is_the_slower_of_disk_and_cores():
    disk = costs.conversion(LLAMA_8B, read_rate=1e9, cores=64)
    assert disk.seconds == pytest.approx((disk.source_bytes + disk.disk_bytes) / 1e9)
    cores = costs.conversion(LLAMA_8B, read_rate=1e12, cores=2)
    assert cores.seconds == pytest.approx(cores.source_bytes / 2.4e9)
    assert costs.conversion(LLAMA_8B).seconds is None


def test_a_step_reads_no_embedding_unless_it_is_the_head():
    work = Workload(1024)
    read = costs.step_bytes(LLAMA_8B, work, "16bit")
    whole = footprint(LLAMA_8B, work, "16bit")
    assert read == whole.weight_bytes + whole.kv_bytes - 2 * 128256 * 4096
    tied = Model.from_recipe(architecture(preset("smollm2-135m")))
    whole = footprint(tied, work, "int8")
    assert costs.step_bytes(tied, work, "int8") == whole.weight_bytes + whole.kv_bytes


def test_what_fits_nowhere_has_no_cost():
    found = costs.serving(LLAMA_8B, Workload(), GIB // 4)
    assert (found.int8_gpus, found.relative_cost) == (None, None)


def test_read_rate_is_that_of_a_real_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(32 << 20))
    assert 1e6 < costs.read_rate([path, path]) < 1e12
