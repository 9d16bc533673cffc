"""What both of two processes compute: run as `python pair.py RANK COUNT FOLDER`; nothing here needs Lightning.

The test computes the same with COUNT = 1 in its own process, by calling `compute`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from steerfm.backbones import LoRA
from steerfm.conditions import Labels
from steerfm.digits import CAPTIONS
from steerfm.distributed import (
    gather,
    gather_particles,
    group_statistics,
    mean_and_std,
    names_everywhere,
    shard,
    share_out,
    whole,
    world,
)
from steerfm.finetuning import (
    AdaptedNoise,
    AdjointMatching,
    Batch,
    DirectBackprop,
    DirectPreference,
    FineTuning,
    LeapAlign,
    NegativeAware,
    NoiseAdapter,
    PolicyGradient,
    RewardAdaptive,
    RewardDistillation,
    RewardFeedback,
    TiltMatching,
    ValueMatching,
    WeightedRegression,
)
from steerfm.finetuning.pools import CHUNK, taken
from steerfm.flow_map import FlowMap
from steerfm.networks import MLP, Critic, DiT, UNet
from steerfm.networks.mlp import randomise
from steerfm.objectives import (
    Adversarial,
    Compositional,
    Consistency,
    Eulerian,
    FlowMapMatching,
    FlowMatching,
    IntegralKL,
    Lagrangian,
    Reflow,
    SelfAverage,
    TeacherDenoises,
    Total,
)
from steerfm.objectives.teachers import parts_of
from steerfm.reward import Reward, as_reward
from steerfm.sampling import Unsteered
from steerfm.seeds import BatchGenerator, RowDraws
from steerfm.steering import (
    BeamSearch,
    BestOfN,
    FlowMapControl,
    FlowMapTilting,
    LookAheadGuidance,
    NoiseOptimisation,
    NoiseSampling,
    PathSearch,
    PosteriorDrawGuidance,
    SequentialMonteCarlo,
    Steering,
    SuccessiveHalving,
    ZeroOrderSearch,
)
from steerfm.steering.populations import Populations
from steerfm.steering.posterior import Glass

ROWS = 8  # of the global batch
SPLIT = 3  # where the uneven rows of `functions` are divided
NETWORKS = ("mlp", "unet", "dit")


CORE = ("lagrangian", "psd_uniform", "mean_flow", "reflow", "integral_kl")
CORE += ("noise", "weighted_regression", "policy_gradient", "negative_aware", "reward_distillation")
CORE += ("best_of_n", "guidance", "tilting", "monte_carlo")  # four processes compute these


def core(known: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what is computed of a table: all of it by one process and by two, by more the core."""
    return known if world()[1] <= 2 else {name: each for name, each in known.items() if name in CORE}


def network(kind: str) -> nn.Module:
    if kind == "unet":
        return UNet((1, 8, 8), channels=(8, 8), num_classes=10, attention_heads=2, groups=2, frequencies=4)
    if kind == "dit":
        return DiT((1, 8, 8), patch=2, width=12, depth=2, heads=2, num_classes=10, frequencies=4, decoupled=1)
    return MLP((1, 8, 8), width=16, depth=1, frequencies=4, num_classes=10)


def flow_map(kind: str = "mlp", seed: int = 0) -> FlowMap:
    """Return a random map in float64, which sums in any order to the same to 1e-12."""
    built = network(kind)
    randomise(built, seed=seed)
    return FlowMap(built, conditioner=Labels(CAPTIONS)).double()


def with_lora() -> FlowMap:
    """Return a random map with low-rank additions that are no longer zero."""
    tuned = LoRA(2)(flow_map())
    generator = torch.Generator().manual_seed(9)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return tuned


def with_noise_adapter() -> FlowMap:
    """Return a random map behind a random adapter of its noise."""
    adapter = network("mlp")
    randomise(adapter, seed=3)
    return NoiseAdapter(adapter)(flow_map())


TEACHER = flow_map(seed=5)
AVERAGE = SelfAverage()
AVERAGE.begin(flow_map(seed=6))
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "flow_matching": FlowMatching(),
    "flow_matching_teacher": FlowMatching(TEACHER),
    "reflow": Reflow(TEACHER, steps=2),
    "lagrangian": Lagrangian(),
    "lagrangian_central": Lagrangian(derivative="central"),
    "lmd": Lagrangian(teacher=TEACHER, stop="nothing"),
    "ayf_lmd": Lagrangian(teacher=TEACHER, stop="target"),
    "tvm": Lagrangian(teacher=AVERAGE),
    "compositional": Compositional(),
    "psd_uniform": Compositional("uniform"),
    "pfmm": Compositional(teacher=TEACHER, euler_below=0.2),
    "mean_flow": Eulerian(),
    "improved_mean_flow": Eulerian(along="self"),
    "esd": Eulerian(velocity="self", stop="spatial"),
    "emd": Eulerian(velocity="teacher", teacher=TEACHER, stop="nothing"),
    "scm": Eulerian(normalise=0.1),
    "consistency": Consistency(average=AVERAGE),
    "ctm": Consistency(0.1, relative=True, velocity="teacher", teacher=TEACHER, compare="data"),
    "fmm": FlowMapMatching(),
    "integral_kl": IntegralKL(TEACHER, flow_map(seed=11), every=1),
    "adversarial": Adversarial(Critic(flow_map(seed=12).network)),
    "teacher_denoises": TeacherDenoises(TEACHER),
    "total": Total([Compositional(), FlowMatching()], [1.0, 0.5]),
}


def normal(seed: int, *shape: int) -> Tensor:
    """Return normal numbers in float64 that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(rows: Any) -> Any:
    """Return this process's rows of a global batch, as `own_rows` divides it."""
    rank, count = world()
    return rows[rank::count]


class Loss(nn.Module):
    """One training step as a module, so that DDP sees the whole of it, as it does in Lightning."""

    def __init__(self, network: FlowMap, step: Callable[[FlowMap], Tensor], part: Any = None) -> None:
        super().__init__()
        self.network = network
        self.companions = nn.ModuleDict(parts_of({"part": part}).companions)  # a critic, say, which is trained too
        self.step = step

    def forward(self) -> Tensor:
        return self.step(self.network)


def gradients(loss: Loss) -> dict[str, Tensor]:
    """Return the gradients of the second of two steps: some mistakes only show then."""
    run: nn.Module = DistributedDataParallel(loss) if world()[1] > 1 else loss
    for _ in range(2):
        loss.zero_grad()
        run().backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}


def sharded_gradients(loss: Loss) -> dict[str, Tensor]:
    """Return the gradients of the second of two steps of a map whose weights are shared out (FSDP2)."""
    share_out(loss.network.network, init_device_mesh("cpu", (world()[1],)))
    for _ in range(2):
        loss.zero_grad()
        loss().backward()
    found = {name: p.grad for name, p in loss.network.named_parameters() if p.grad is not None}
    return {f"network.{name}": whole(gradient) for name, gradient in found.items()}


def prompts() -> list[str]:
    return [CAPTIONS[i % 10] if i % 3 else "" for i in range(ROWS)]


def objective_step(name: str) -> Callable[[FlowMap], Tensor]:
    """Return the mean loss of an objective on this process's rows."""
    x0, x1 = own(normal(1, ROWS, 1, 8, 8)), own(normal(2, ROWS, 1, 8, 8))
    a, b = (normal(3 + i, ROWS).sigmoid() for i in range(2))
    s, t = own(torch.maximum(a, b)), own(torch.minimum(a, b))

    def step(network: FlowMap) -> Tensor:
        condition = network.encode_prompts(own(prompts()))
        generator = BatchGenerator(0, 1, own(range(ROWS)), ROWS)
        return OBJECTIVES[name](network, x0, x1, s, t, condition, generator).mean()

    return step


METHODS: dict[str, FineTuning] = {
    "noise": DirectBackprop(2, penalty="noise"),
    "path": DirectBackprop(2, penalty="path"),
    "random": DirectBackprop(3, "random", penalty="sample"),
    "renoised": DirectBackprop(2, 1, penalty="sample", renoised=2),
    "reward_feedback": RewardFeedback(),
    "leap_align": LeapAlign(4),
    "adjoint_matching": AdjointMatching(4, matched=2),
    "weighted_regression": WeightedRegression(1, 2),
    "weighted_regression_pool": WeightedRegression(1, 2, pool=150),
    "tilt_matching": TiltMatching(1, 2),
    "reward_adaptive": RewardAdaptive(1, 2),
    "value_matching": ValueMatching(3, Glass(2), levels=3, jumps=1),
    "negative_aware": NegativeAware(0.3, 0.4, jumps=1, repeats=2),
    "policy_gradient": PolicyGradient(3),
    "policy_gradient_jumps": PolicyGradient(2, "jumps", every=2),
    "preferences": DirectPreference(2),
    "reward_distillation": RewardDistillation(Compositional("uniform")),
    "adapted_noise": AdaptedNoise(),
}
SHARDED_CASES = [("dit", name) for name in OBJECTIVES] + [("unet", "lagrangian"), ("unet", "esd")]
METHOD_CASES = [
    (kind, name) for name in METHODS for kind in (("noise_adapter",) if name == "adapted_noise" else ("mlp", "lora"))
]
SHARDED_METHODS = [(kind, name) for kind, name in METHOD_CASES if kind != "noise_adapter"]  # which is refused
MAPS: dict[str, Callable[[], FlowMap]] = {"mlp": flow_map, "lora": with_lora, "noise_adapter": with_noise_adapter}


def tuning_step(name: str) -> Callable[[FlowMap], Tensor]:
    """Return the mean loss of a fine-tuning method on this process's rows, whose prompts repeat."""
    method = METHODS[name]
    reward = as_reward(lambda images: images.square().mean((1, 2, 3)))
    companion = getattr(method, "old", None)
    if companion is not None:
        companion.begin(flow_map(seed=8))
    pictures = {f"image_{side}": own(normal(40 + i, ROWS, 1, 8, 8).sigmoid()) for i, side in enumerate("ab")}
    pictures["preferred"] = own(torch.arange(ROWS) % 2)

    return lambda network: method(replace(tuning_batch(network, reward), data=pictures)).loss.mean()


def tuning_batch(network: FlowMap, reward: Reward) -> Batch:
    """Return this process's rows of a batch whose prompts repeat."""
    rows = own(range(ROWS))
    texts = [prompts()[row // 2] for row in rows]
    return Batch(
        network, flow_map(seed=7).requires_grad_(False), reward, texts, network.encode_prompts(texts), 0.3,
        RowDraws(0, 1, rows), BatchGenerator(0, 1, rows, ROWS),
    )  # fmt: skip


def all_gradients() -> Iterator[tuple[str, Tensor]]:
    for kind in NETWORKS:
        for name in core(OBJECTIVES):
            step = objective_step(name)
            for parameter, gradient in gradients(Loss(flow_map(kind), step, OBJECTIVES[name])).items():
                yield f"gradient/{kind}/{name}/{parameter}", gradient
    for kind, name in METHOD_CASES:
        if name not in core(METHODS):
            continue
        for parameter, gradient in gradients(Loss(MAPS[kind](), tuning_step(name), METHODS[name])).items():
            yield f"gradient/{kind}/{name}/{parameter}", gradient


def all_sharded() -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients of shared-out maps, where there are two processes to share them."""
    if world()[1] != 2:
        return
    losses = {f"{kind}/{name}": (flow_map(kind), objective_step(name)) for kind, name in SHARDED_CASES}
    losses |= {f"{kind}/{name}": (MAPS[kind](), tuning_step(name)) for kind, name in SHARDED_METHODS}
    for case, (tuned, step) in losses.items():
        for parameter, gradient in sharded_gradients(Loss(tuned, step)).items():
            yield f"sharded/{case}/{parameter}", gradient


def functions() -> Iterator[tuple[str, Tensor]]:
    """Yield what the functions of steerfm.distributed return, on rows divided 3 and 5."""
    rank, count = world()
    mine = slice(None) if count == 1 else (slice(SPLIT), slice(SPLIT, None))[rank]
    values, points = normal(30, ROWS)[mine], normal(31, ROWS, 2)[mine]
    yield "gather/values", gather(values)
    yield "gather/points", gather(points.requires_grad_(True))
    yield "gather/long", gather(torch.arange(ROWS)[mine])
    yield "gather/float32", gather(points.detach().float())
    names = names_everywhere([["a\n", "ü", "a\n"], ["", "b"]][rank] if count == 2 else ["b", "ü", "", "a\n"])
    yield "gather/names", torch.tensor([ord(letter) for letter in json.dumps(names)])
    nothing = points.detach()[: len(points) if rank == 0 else 0]
    yield "gather/one_is_empty", gather(nothing)
    mean, std = mean_and_std(values)
    yield "mean_and_std", torch.stack([mean, std])
    for size in (2, 4, 8):  # groups lie across the division
        groups = [str(row // size) for row in range(ROWS)][mine]
        for name, statistic in zip(("mean", "std", "size", "largest"), group_statistics(values, groups), strict=True):
            yield f"own/group_{name}/{size}", statistic
    scored: list[int] = []
    reward = as_reward(lambda images: scored.append(len(images)) or images.mean((1, 2, 3)))
    taken(tuning_batch(flow_map(), reward), 4 * CHUNK, 1)
    yield "pool/scored", gather(torch.tensor([float(sum(scored))])).sum()  # each draw on one process
    pairs = normal(32, 3, ROWS, 2)
    yield "gather/particles", gather_particles(pairs[:, mine])


STEERING: dict[str, Steering | Unsteered] = {
    "jumps": Unsteered("renoised", 2, gamma=0.5),
    "sde": Unsteered("sde", 3),
    "best_of_n": BestOfN(3, 1, 0.05),
    "successive_halving": SuccessiveHalving(4),
    "zero_order_search": ZeroOrderSearch(2, 2),
    "beam_search": BeamSearch(2, 2, 2),
    "path_search": PathSearch(2, 2),
    "noise_optimisation": NoiseOptimisation(1, 2),
    "control": FlowMapControl(3),
    "guidance": LookAheadGuidance(3, noise="gentle"),
    "posterior_draws": PosteriorDrawGuidance(2, count=2, draws=Glass(2)),
    "tilting": FlowMapTilting(6, 5, temperature=0.05),
    "monte_carlo": SequentialMonteCarlo(4, 3, temperature=0.05),
    "noise_sampling": NoiseSampling(3, warm_up=2, iterations=1, temperature=0.05),
}


def steered() -> Iterator[tuple[str, Tensor]]:
    """Yield samples of every method, whose seeds are divided over the processes; populations divided too."""
    network, seeds = flow_map(), shard(list(range(5)))
    reward = as_reward(lambda images: images[..., :4].mean((1, 2, 3)))
    for name, method in core(STEERING).items():
        out = method(network, reward, prompts=[CAPTIONS[2]], seeds=seeds)
        yield f"own/steering/{name}", out.x0
        if isinstance(method, Populations):
            out = replace(method, split=True)(network, reward, prompts=[CAPTIONS[2]], seeds=[3, 4])
            yield f"split/{name}/x0", out.x0


def tilting() -> Iterator[tuple[str, Tensor]]:
    """Yield populations whose particles are divided over the processes."""
    network = flow_map()
    reward = as_reward(lambda images: images[..., :4].mean((1, 2, 3)))
    chains = NoiseSampling(5, warm_up=3, iterations=3, temperature=0.05, split=True)
    out = chains(network, reward, prompts=CAPTIONS[2:4], seeds=[3, 4])
    assert out.particles is not None
    yield "split/chains/particles", out.particles
    for resampling in ("systematic", "stratified"):  # particles are divided: three and two, one resampling for all
        method = FlowMapTilting(5, 6, temperature=0.05, resampling=resampling, split=True, resample_below=0.9)
        out = method(network, reward, prompts=CAPTIONS[2:4], seeds=[3, 4])
        assert out.particles is not None
        assert out.log_weights is not None
        assert out.log_evidence is not None
        yield f"split/{resampling}/x0", out.x0
        yield f"split/{resampling}/particles", out.particles
        yield f"split/{resampling}/log_weights", out.log_weights
        yield f"split/{resampling}/log_evidence", out.log_evidence
        yield f"split/{resampling}/sizes", out.trace["effective_sample_size"]
        yield f"split/{resampling}/calls", torch.tensor([out.cost.network_calls, out.cost.reward_gradients])


def compute() -> dict[str, Tensor]:
    """Return everything by name, of four processes the core; names that begin with own/ hold this process's rows."""
    if world()[1] > 2:
        found = [*all_gradients(), *steered()]
        return {name: tensor.detach().clone().contiguous() for name, tensor in found}
    found = [*all_gradients(), *all_sharded(), *functions(), *steered(), *tilting()]
    return {name: tensor.detach().clone().contiguous() for name, tensor in found}


def main(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    save_file(compute(), folder / f"rank{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
