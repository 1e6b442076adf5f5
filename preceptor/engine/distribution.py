"""One module that learns, its optimizer, and the processes that share it (DDP copies or FSDP2 shards).

DDP and FSDP2 average gradients over the processes, each process sums its own terms: so at the optimizer step gradients
are multiplied by ``processes / terms counted everywhere``, once, together with clipping.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from preceptor.engine import checkpoint
from preceptor.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.fsdp import FSDPModule

    from preceptor.engine.settings import Training

T = TypeVar("T")


@dataclass
class Learner:
    """A module, its optimizer, and what the current optimizer step has summed so far.

    ``module`` is what the recipe calls, ``bare`` the same without a wrapper; ``parameters`` are those that learn, by
    name; ``frozen`` those that do not.
    """

    name: str
    module: nn.Module
    bare: nn.Module
    training: Training
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    frozen: list[tuple[str, Tensor]]
    _sums: Tensor | None = None
    _names: list[str] = field(default_factory=list)

    def add(
        self, loss_sum: Tensor, count: Tensor | float, parts: Mapping[str, Tensor | float], *, idle: bool, alone: bool
    ) -> None:
        """Backward of one micro-batch; an idle process takes part with a gradient and sums of zero.

        With further modules in the run (not `alone`), the gradient goes to this one's parameters only.
        """
        inputs = None if alone or _sharded(self.bare) is not None else list(self.parameters.values())
        torch.autograd.backward(loss_sum * 0.0 if idle else loss_sum, inputs=inputs)
        kind = torch.float32 if loss_sum.device.type == "mps" else torch.float64
        with torch.no_grad():
            values = [loss_sum, count, *parts.values()]
            sums = torch.stack([torch.as_tensor(value, dtype=kind, device=loss_sum.device) for value in values])
            sums = torch.zeros_like(sums) if idle else sums
        if self._sums is None:
            self._sums, self._names = sums, list(parts)
        elif self._names == list(parts):
            self._sums += sums
        else:
            raise ValueError(f"parts differ between micro-batches: {self._names} and {list(parts)}")

    def measure(self, accelerator: Accelerator) -> dict[str, float]:
        """What the step measured over all micro-batches and processes, in one transfer from the device.

        ``loss`` and parts divided by ``count``; ``gradient_norm``, that of the mean loss before clipping.
        """
        assert self._sums is not None
        sums, world = self._sums, accelerator.num_processes
        self._sums = None
        if world > 1:
            torch.distributed.all_reduce(sums)
        gradients = self._gradients()
        norm = checkpoint.full(torch.nn.utils.get_total_norm(gradients)) if gradients else sums.new_zeros(())
        loss, count, *parts, length = torch.cat([sums, norm.to(sums).reshape(1)]).tolist()
        share = 1.0 / count if count else 0.0
        measured = {"loss": loss * share, "count": count, "gradient_norm": length * world * share}
        return measured | {name: value * share for name, value in zip(self._names, parts, strict=True)}

    def apply(self, measured: Mapping[str, float], rate: float, world: int) -> None:
        """Divides the gradients by the count, clips them, and steps the optimizer at the learning rate `rate`."""
        clip, norm = self.training.clip, measured["gradient_norm"]
        factor = world / measured["count"]
        if clip is not None and norm > clip:
            factor *= clip / (norm + 1e-6)
        gradients = self._gradients()
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_state(self, tensors: dict[str, Tensor]) -> None:
        """Puts what learns (not what is frozen), the buffers and the optimizer's state into `tensors`, gathered."""
        for name, value in self._stored():
            tensors[f"{self.name}.{name}"] = checkpoint.full(value.detach()).contiguous()
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"{self.name}:{key}:{name}"] = checkpoint.full(value).contiguous()

    @torch.no_grad()
    def put_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `take_state` saved.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        for name, value in self._stored():
            saved = tensors.get(f"{self.name}.{name}")
            if saved is None or saved.shape != value.shape:
                found = "is missing" if saved is None else f"has the shape {tuple(saved.shape)}"
                raise UserError(
                    f"{name} of the {self.name} {found} in the checkpoint, not {tuple(value.shape)}: "
                    "resume with the same student, or choose another folder."
                )
            value.copy_(checkpoint.like(saved, value))
        for key, saved in tensors.items():
            owner, _, rest = key.partition(":")
            slot, _, name = rest.partition(":")
            if owner == self.name and name in self.parameters:
                parameter = self.parameters[name]
                self.optimizer.state[parameter][slot] = checkpoint.like(saved, parameter)

    def release(self) -> None:
        """Gives the bare module its own forward back, without autocast: its caller now chooses the precision."""
        # Not unwrap_model, which takes off what decorates the module's own forward too.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.bare.__dict__.pop(name, None)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def _stored(self) -> list[tuple[str, Tensor]]:
        lasting = self.bare.state_dict().keys()
        buffers = [(name, value) for name, value in self.bare.named_buffers() if name in lasting]
        return [*self.parameters.items(), *buffers]


def start(precision: str, trackers: tuple[str, ...], folder: Path) -> Accelerator:
    """The accelerator of this process: its device, its precision, and the other processes of the run.

    Raises:
        UserError: a tracker is not installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"The tracker {tracker} is not installed: pip install {tracker}, or do without it.")
    mixed = {"fp32": "no", "bf16": "bf16"}[precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        # Accelerate keeps the precision of the first run of a process; a later run may want another.
        AcceleratorState._reset_state(False)
    log_with: Any = list(trackers) or None
    # Without this, processes launched on a machine that has no accelerator would not find each other.
    alone = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=mixed, log_with=log_with, project_dir=str(folder), cpu=alone)
    if accelerator.num_processes > 1:
        # A process that ends while the group's threads still run is aborted now and then.
        atexit.unregister(_leave)
        atexit.register(_leave)
    return accelerator


def seed(number: int, accelerator: Accelerator) -> None:
    """Seeds the generators of Python, numpy and torch; each of several processes gets a seed of its own."""
    from accelerate.utils import set_seed

    set_seed(number, device_specific=accelerator.num_processes > 1)


def to_device(batch: T, device: torch.device) -> T:
    """The batch (tensors in lists, dicts, dataclasses with a method ``to``) on the device."""
    if device.type == "cpu":
        return batch
    from accelerate.utils import send_to_device

    moved: T = send_to_device(batch, device)
    return moved


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare(name: str, module: nn.Module, training: Training, accelerator: Accelerator, *, shard: bool) -> Learner:
    """Places a module that learns on the device and over the processes, and makes its optimizer.

    Raises:
        UserError: nothing in the module requires a gradient.
    """
    frozen_names = {key for key, value in module.named_parameters() if not value.requires_grad}
    if not any(value.requires_grad for value in module.parameters()):
        raise UserError(f"No parameter of the {name} requires a gradient: unfreeze it or give it an adapter.")
    module.train()
    if shard and accelerator.num_processes > 1:
        wrapped = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
        wrapped = place(wrapped, accelerator, shard=True)
    else:
        wrapped = accelerator.prepare_model(module)
    parameters = {key: value for key, value in module.named_parameters() if key not in frozen_names}
    frozen: list[tuple[str, Tensor]] = [(k, v) for k, v in module.named_parameters() if k in frozen_names]
    optimizer = make_optimizer(list(parameters.values()), training)
    return Learner(name, wrapped, module, training, optimizer, parameters, frozen)


def make_optimizer(parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The optimizer of the settings, fused; weight decay reaches only parameters of two dimensions or more."""
    decayed = [p for p in parameters if p.ndim >= 2 or training.weight_decay == 0]
    others = [p for p in parameters if p.ndim < 2 and training.weight_decay != 0]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": training.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
    groups = [group for group in groups if group["params"]]
    rate = training.learning_rate
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=training.momentum, fused=True)
    rule = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return rule(groups, lr=rate, betas=(training.momentum, 0.999), fused=True)


def place(module: nn.Module, accelerator: Accelerator, *, shard: bool) -> nn.Module:
    """Moves a module to the device; with `shard`, splits every block of its lists, and the rest, over the processes."""
    module = module.to(accelerator.device)
    if not shard or accelerator.num_processes == 1:
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for value in [*module.parameters(), *module.buffers()]:
        torch.distributed.broadcast(value.data, 0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    low = accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    blocks = [child for parent in module.modules() if isinstance(parent, nn.ModuleList) for child in parent]
    for block in [*reversed(blocks), module]:
        if block is module or any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return module


def _sharded(module: nn.Module) -> FSDPModule | None:
    """The module as one that FSDP2 has split, or None."""
    from torch.distributed.fsdp import FSDPModule

    return module if isinstance(module, FSDPModule) else None


def synchronise(learners: Iterable[Learner], on: bool) -> None:
    """Whether the coming backward exchanges gradients between processes (that of a step's last micro-batch does)."""
    for learner in learners:
        if (sharded := _sharded(learner.bare)) is not None:
            sharded.set_requires_gradient_sync(on)
        elif isinstance(learner.module, DistributedDataParallel):
            learner.module.require_backward_grad_sync = on


def memory_mib(device: torch.device) -> float:
    """MiB: the largest amount held so far, on the GPU if there is one, by the process otherwise; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    # The peak that getrusage reports is inherited from the process that started this one.
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="ascii", errors="replace"))):
        return int(peak[1]) / 2**10
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def gather_objects(value: Any, accelerator: Accelerator) -> list[Any]:
    """`value` of every process, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def flat(training: Training) -> dict[str, Any]:
    """The settings as trackers take them: numbers and text."""
    values = dataclasses.asdict(training)
    return {name: v if isinstance(v, (int, float, str)) else str(v) for name, v in values.items()}
