"""Two machines, as two network namespaces with an address each and a cable between them that is cut in the middle.

torchrun runs on both. It needs root, or a kernel that lets users make namespaces, and is skipped elsewhere.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS, EVERY, TIMEOUT = 400, 40, 1.0  # the timeout in minutes
PLACES = ("steerfm-here", "steerfm-there")
CABLES = ("sfm0", "sfm1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def machines() -> Iterator[None]:
    """Make the two namespaces, and take them away afterwards."""
    if shutil.which("ip") is None or ip("netns", "add", PLACES[0]).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("netns", "add", PLACES[1])
        ip("link", "add", CABLES[0], "netns", PLACES[0], "type", "veth", "peer", "name", CABLES[1], "netns", PLACES[1])
        for place, cable, address in zip(PLACES, CABLES, ADDRESSES, strict=True):
            ip("-n", place, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", place, "link", "set", "lo", "up")
            up = ip("-n", place, "link", "set", cable, "up")
            if up.returncode:
                pytest.skip(f"network namespaces cannot be connected here ({up.stderr})")
        yield
    finally:
        for place in PLACES:
            ip("netns", "del", place)


def training(folder: Path, name: str, *more: str) -> list[str]:
    values = ["network.width=16", "network.depth=1", f"trainer.max_steps={STEPS}", f"checkpoint_every={EVERY}"]
    values += ["module.flow_matching_steps=20", "data.batch_size=16", "callbacks.grid=null", "logger=none"]
    values += ["trainer.enable_progress_bar=false", f"name={name}", f"folder={folder}"]
    return ["steerfm.cli", "train", "recipe=digits", *values, *more]


def start(place: int, command: list[str], port: int) -> subprocess.Popen[str]:
    """Start torchrun on a machine, with one process that trains."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={place}"]
    run += [f"--master-addr={ADDRESSES[0]}", f"--master-port={port}", "-m", *command]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLES[place], "OMP_NUM_THREADS": "1"}
    words = ["ip", "netns", "exec", PLACES[place], *run]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """Return the exit codes and what was printed; all have to end within so many seconds."""
    deadline, found = time.monotonic() + seconds, []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found.append((process.returncode, output))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cut_cable_ends_the_run_and_the_same_command_goes_on(machines: None, tmp_path: Path) -> None:
    more = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    both = training(tmp_path, "both", *more, f"trainer.strategy.timeout={TIMEOUT}")
    processes = [start(place, both, 29517) for place in range(2)]
    wanted, deadline = tmp_path / "both" / "checkpoints" / f"step={EVERY:08d}.ckpt", time.monotonic() + 600
    while not wanted.exists() and time.monotonic() < deadline and all(each.poll() is None for each in processes):
        time.sleep(0.02)
    ip("-n", PLACES[0], "link", "set", CABLES[0], "down")
    found = finished(processes, 60 * TIMEOUT + 240)
    assert wanted.exists(), found
    for code, output in found:
        assert code != 0, output
        assert "Another process was lost, or silent for too long, after step" in output, output
        assert f"the same command goes on from {tmp_path / 'both' / 'checkpoints' / 'step='}" in output, output
    assert not (tmp_path / "both" / "map").exists()

    ip("-n", PLACES[0], "link", "set", CABLES[0], "up")
    found = finished([start(place, both, 29518) for place in range(2)], 600)
    assert [code for code, _ in found] == [0, 0], "\n".join(output for _, output in found)
    alone = [sys.executable, "-m", *training(tmp_path, "alone")]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    weights = [load_file(tmp_path / name / "map" / "flow_map.safetensors") for name in ("both", "alone")]
    for name, tensor in weights[1].items():
        assert torch.allclose(weights[0][name], tensor, atol=2e-4), name  # float32, 400 steps, other sums
