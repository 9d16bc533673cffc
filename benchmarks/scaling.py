"""What several processes cost: DDP's throughput against one process, and memory under FSDP2 against DDP.

    python benchmarks/scaling.py throughput      two CPU cores, about 5 min
    python benchmarks/scaling.py memory          two CPU cores, about 2 min

Throughput: two processes of one thread, each with its rows of a batch twice as large, against one process of one
thread, alone; and against two that step side by side and know nothing of each other, which tells what they pay for one
machine's memory from what they pay for DDP. Rounds alternate, so that a slow spell of the machine hits all three. The
seconds of a step are the fastest round's; processor seconds, which another program's load hardly changes, are those of
one process, gloo's threads among them, and the median of the rounds' ratios. A step is that of recipe=digits with a
larger map: flow matching on three quarters of 512 rows a process and LSD on the rest, AdamW.

Memory: what one process of two holds after a step of AdamW on a DiT of 58 million parameters in float32: the weights,
gradients and optimiser states that it keeps, and the most that it ever had resident beyond what it began with.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from steerfm import MLP, DiT, FlowMap, Lagrangian
from steerfm.distributed import share_out, wait, world
from steerfm.objectives.flow_matching import flow_matching

ROWS, STEPS, ROUNDS = 512, 8, 6
KINDS = {"one": "one process", "apart": "two, unconnected", "two": "two (DDP)"}
LARGE: dict[str, Any] = {"patch": 2, "width": 512, "depth": 12, "heads": 8}


class Loss(nn.Module):
    """A training step as a module, so that DDP sees the whole of it, as it does in Lightning."""

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        self.flow_map = flow_map

    def forward(self, x0: Tensor, x1: Tensor, s: Tensor, t: Tensor) -> Tensor:
        on = 3 * len(x0) // 4
        losses = [flow_matching(self.flow_map, x0[:on], x1[:on], s[:on])]
        losses.append(Lagrangian()(self.flow_map, x0[on:], x1[on:], s[on:], t[on:]))
        return torch.cat(losses).mean()


def stepper(run: nn.Module, parameters: Any, rows: int, shape: tuple[int, ...]) -> Callable[[], None]:
    """Return a function that takes one step of AdamW on random rows."""
    optimizer = AdamW(parameters, lr=1e-4)
    x0, x1 = torch.randn(2, rows, *shape)
    a, b = torch.rand(2, rows)

    def step() -> None:
        optimizer.zero_grad()
        run(x0, x1, torch.maximum(a, b), torch.minimum(a, b)).backward()
        optimizer.step()

    step.optimizer = optimizer  # type: ignore[attr-defined]
    return step


def throughput() -> list[dict[str, float]]:
    """Return the seconds, and this process's processor seconds, of a step in each round, of each of KINDS."""
    torch.manual_seed(0)
    loss = Loss(FlowMap(MLP((1, 8, 8), width=512, depth=4, expansion=2.0)))
    kinds = dict(zip(KINDS, (loss, loss, DistributedDataParallel(loss)), strict=True))
    steps = {name: stepper(run, loss.parameters(), ROWS, (1, 8, 8)) for name, run in kinds.items()}
    found = []
    for turn in range(ROUNDS + 1):  # the first is not counted
        row = {}
        for name, step in steps.items():
            wait()
            if name != "one" or world()[0] == 0:  # one: the other waits, and sleeps in the socket
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    step()
                row[name] = (time.perf_counter() - wall) / STEPS
                row[f"{name}_processor"] = (time.process_time() - processor) / STEPS
        found += [row] if turn and world()[0] == 0 else []
    return found


def memory(kind: str) -> list[dict[str, float]]:
    """Return in MiB what this process keeps after a step, and the most that it had resident."""
    torch.manual_seed(0)
    begin = _resident()
    flow_map = FlowMap(DiT((4, 16, 16), **LARGE))
    count = sum(p.numel() for p in flow_map.parameters())
    loss: nn.Module = Loss(flow_map)
    if kind == "ddp":
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    else:
        share_out(flow_map.network, init_device_mesh("cpu", (world()[1],)))
    step: Any = stepper(loss, flow_map.parameters(), 4, (4, 16, 16))
    for _ in range(2):
        step()
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    gradients = [p.grad for p in flow_map.parameters()]
    sizes = {"weights": list(flow_map.parameters()), "gradients": gradients, "optimiser": states}
    row = {name: sum(_local(tensor) for tensor in tensors) / 2**20 for name, tensors in sizes.items()}
    return [row | {"resident": _resident() - begin, "parameters": count / 1e6}]


def _local(tensor: Any) -> float:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _resident() -> float:
    """Return the most that this process has had resident, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def together(what: str) -> list[dict[str, float]]:
    """Return what two processes of one thread find, rank zero's."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, what, "--meeting", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(2)]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"{what}: a process failed, see above.")
        return json.loads((Path(folder) / "found.json").read_text())


def one_of_two(what: str, rank: int, folder: str) -> None:
    """Measure as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = throughput() if what == "throughput" else memory(what)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    wait()
    dist.destroy_process_group()


def main() -> None:
    """Measure what was asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "memory", "ddp", "fsdp"])
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting")
    arguments = parser.parse_args()
    if arguments.meeting:
        one_of_two(arguments.what, arguments.rank, arguments.meeting)
    elif arguments.what == "throughput":
        _print_throughput(together("throughput"))
    else:
        _print_memory({kind: together(kind)[0] for kind in ("ddp", "fsdp")})


def _print_throughput(rounds: list[dict[str, float]]) -> None:
    table = Table("", *KINDS.values(), "DDP over one", "over unconnected")
    for title, end in (("fastest step, ms", ""), ("processor time of a process, ms", "_processor")):
        columns = {name: [each[f"{name}{end}"] for each in rounds] for name in KINDS}
        more = []
        for name in ("one", "apart"):
            ratios = [b / a for a, b in zip(columns[name], columns["two"], strict=True)]
            more.append(statistics.median(ratios) if end else min(columns["two"]) / min(columns[name]))
        cells = [f"{1e3 * min(column):.1f}" for column in columns.values()]
        table.add_row(title, *cells, *(f"{100 * (ratio - 1):+.0f} %" for ratio in more))
    rows = [ROWS * (1 if name == "one" else 2) / min(each[name] for each in rounds) for name in KINDS]
    times = [f"{rows[2] / each:.2f} times" for each in rows[:2]]
    table.add_row("rows a second", *(f"{each:.0f}" for each in rows), *times)
    Console().print(table)


def _print_memory(found: dict[str, dict[str, float]]) -> None:
    table = Table(f"MiB a process, {found['ddp']['parameters']:.0f} million parameters", *found)
    for name in ("weights", "gradients", "optimiser", "resident"):
        table.add_row(name, *(f"{row[name]:.0f}" for row in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
