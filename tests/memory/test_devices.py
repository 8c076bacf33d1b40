"""What this machine has, learned without torch."""

import subprocess

from halfweight.memory import devices
from halfweight.memory.workload import MIB


def test_an_nvidia_gpu_is_what_nvidia_smi_prints(monkeypatch):
    line = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 81004, 9.0\nNVIDIA H100, 580, 1, 1\n"
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        devices.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, line, ""),
    )
    found = devices.local_device()
    assert found == devices.Device(
        "cuda", "NVIDIA H100 80GB HBM3", "580.95.05", 81559 * MIB, 81004 * MIB, 9.0
    )


def test_without_a_working_driver_it_is_the_processor(monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        devices.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 9, "", "no driver"),
    )
    found = devices.local_device()
    assert (found.kind, found.name) == ("cpu", devices.processor())
    assert 0 < found.free_bytes <= found.total_bytes


def test_a_process_knows_its_own_memory():
    resident = devices.process_bytes("VmRSS")  # first: it may grow
    assert devices.process_bytes("VmHWM") >= resident > 10 * MIB
    assert devices.process_bytes("Name") == 0, "not a size"
