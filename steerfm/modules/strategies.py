"""How several processes train or steer together: replicas (DDP), or shares of the weights (FSDP2).

Both end a run with a sentence when a process is lost, in place of waiting for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed as dist
from torch import nn

from steerfm.callbacks.guard_rails import GuardRails
from steerfm.callbacks.sample_grid import SampleGrid
from steerfm.distributed import like, share_out, whole
from steerfm.errors import ConfigError, RunError
from steerfm.finetuning.noise_adapter import AdaptedNetwork
from steerfm.flow_map import FlowMap
from steerfm.modules.common import Guest

LOST = "connection|timed ?out|timeout|broken pipe|peer|socket|gloo|nccl"  # in what torch says of a process that is gone


class Replicated(DDPStrategy):
    """Train or steer with one replica of the map a process (DDP).

    timeout: minutes for which a process waits for the others before it ends the run with RunError. find_unused: look
    in every step for parameters without a gradient, which costs a walk through the graph, and which a step needs that
    leaves parameters out; None: where an objective says that its steps do (`leaves_out`).
    """

    def __init__(self, timeout: float = 10.0, find_unused: bool | None = None) -> None:
        super().__init__(timeout=_minutes(timeout), gradient_as_bucket_view=True)
        self.find_unused = find_unused

    def configure_ddp(self) -> None:
        """Replicate the module, prepared for steps that leave parameters out where there are any."""
        leaves_out = getattr(self.lightning_module, "leaves_out", False)
        self._ddp_kwargs["find_unused_parameters"] = leaves_out if self.find_unused is None else self.find_unused
        super().configure_ddp()

    def on_exception(self, exception: BaseException) -> None:
        """Say in one sentence what to do where a process is lost."""
        super().on_exception(exception)
        _tell(self.lightning_module, exception)


class Sharded(ModelParallelStrategy):
    """Train with a share of every flow map's weights, gradients and optimiser states in each process (FSDP2).

    Reference and teachers are shared out too; companions must be maps. For sampling take `Replicated`: processes would
    have to make equal numbers of calls. Checkpoints hold whole weights, as any others; at the end every process has
    the whole map again, on the CPU. timeout: as in `Replicated`. Raises ConfigError for a module without a map, what is
    trained outside of maps, and callbacks that sample on one process.
    """

    def __init__(self, timeout: float = 10.0) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=_minutes(timeout))
        self._whole: list[tuple[FlowMap, nn.Module]] = []  # the maps, and their networks without weights

    def setup_environment(self) -> None:
        """Let all processes share one dimension of data."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_processes * self.num_nodes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Share out the maps' weights, then go on as other strategies do."""
        assert self.lightning_module is not None
        _check(trainer, self.lightning_module)
        mesh = self.device_mesh["data_parallel"]
        self._whole = [(flow_map, share_out(flow_map.network, mesh)) for flow_map in maps_of(self.lightning_module)]
        Strategy.setup(self, trainer)  # its own wants configure_model, which needs no part in this

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for the optimisers' states to be loaded."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights, on the CPU of rank zero; nothing elsewhere."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimiser's whole state, on the CPU of rank zero; nothing elsewhere."""
        found = optimizer.state_dict()
        found["state"] = {number: self._gathered(state) for number, state in found["state"].items()}
        return found if self.is_global_zero else {}

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return whole tensors on the CPU of rank zero, one gathered at a time."""
        found = {}
        for name, value in tensors.items():
            full = whole(value) if isinstance(value, torch.Tensor) else value
            if self.is_global_zero:
                found[name] = full.cpu() if isinstance(full, torch.Tensor) else full
        return found

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of whole weights, such as those of any strategy."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Share out the weights of a checkpoint."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: like(t, own[name]) if name in own else t for name, t in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Share out the optimisers' states of a checkpoint."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {number: _as_shares(values, parameters[number]) for number, values in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})

    def on_train_end(self) -> None:
        """Put whole networks in the place of shares."""
        super().on_train_end()
        for flow_map, network in self._whole:
            weights = {name: whole(tensor).cpu() for name, tensor in flow_map.network.state_dict().items()}
            network.load_state_dict(weights, assign=True)
            for name, buffer in flow_map.network.named_buffers():  # also those that no state holds, in training's type
                network.get_buffer(name).data = buffer.cpu()
            flow_map.network = network.train(flow_map.network.training)
        self._whole = []

    def on_exception(self, exception: BaseException) -> None:
        """Say in one sentence what to do where a process is lost."""
        super().on_exception(exception)
        _tell(self.lightning_module, exception)


def _as_shares(state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """Return one parameter's state with what has its shape shared out as it is."""
    shaped = {name for name, value in state.items() if getattr(value, "shape", None) == parameter.shape}
    return {name: like(value, parameter) if name in shaped else value for name, value in state.items()}


def maps_of(module: LightningModule) -> list[FlowMap]:
    """Return the flow maps of a module and of its frozen guests, each network once."""
    held = [each for value in vars(module).values() for each in (value if isinstance(value, list) else [value])]
    roots = [module, *(guest.module for guest in held if isinstance(guest, Guest))]
    found = {id(part.network): part for root in roots for part in root.modules() if isinstance(part, FlowMap)}
    return list(found.values())


def _check(trainer: Trainer, module: LightningModule) -> None:
    """Raise ConfigError for what cannot be done with shares of the weights."""
    if trainer.state.fn != TrainerFn.FITTING:
        raise ConfigError("Sampling goes with whole maps, which need not keep step: use trainer=ddp, not trainer=fsdp.")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SampleGrid | GuardRails):
            raise ConfigError(
                f"{type(callback).__name__} samples on one process, which has a share of the weights alone: leave it "
                "out with trainer=fsdp (set it to null under callbacks), and sample the saved map."
            )
    if any(isinstance(flow_map.network, AdaptedNetwork) for flow_map in maps_of(module)):
        raise ConfigError("A noise adapter is called beside its map, not as a part of it: use trainer=ddp.")
    inside = {id(p) for flow_map in maps_of(module) for p in flow_map.network.parameters()}
    if not inside:
        raise ConfigError(f"trainer=fsdp shares out flow maps, and {type(module).__name__} has none: use trainer=ddp.")
    outside = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ConfigError(
            f"trainer=fsdp trains the networks of flow maps, and '{outside[0]}' is in none of them: use trainer=ddp."
        )


def _tell(module: LightningModule | None, exception: BaseException) -> None:
    """Raise RunError, which says how to go on, where an exception means that another process is gone."""
    if not isinstance(exception, RuntimeError) or not _is_loss(exception):
        return
    trainer = None if module is None else module._trainer
    step = 0 if trainer is None else trainer.global_step
    kept = [] if trainer is None else sorted(Path(trainer.default_root_dir).glob("checkpoints/step=*.ckpt"))
    again = f"goes on from {kept[-1]}" if kept else "goes on with what is there"
    reason = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(exception)).split(". ")[0].splitlines()[0].rstrip(" .")
    raise RunError(
        f"Another process was lost, or silent for too long, after step {step} ({reason}): see its own log for the "
        f"reason; the same command {again}."
    ) from exception


def _is_loss(exception: RuntimeError) -> bool:
    if isinstance(exception, dist.DistError):
        return True
    return not isinstance(exception, torch.OutOfMemoryError) and bool(re.search(LOST, str(exception), re.IGNORECASE))


def _minutes(timeout: float) -> timedelta:
    if not timeout > 0:
        raise ConfigError(f"timeout is in minutes and above 0, got {timeout}.")
    return timedelta(minutes=timeout)
