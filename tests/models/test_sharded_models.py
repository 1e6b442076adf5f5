"""A language model in two processes: DDP and FSDP2 give what one process gives, in learning, sampling and saving."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig

from preceptor.distillation.teachers import AdapterOff, FrozenTeacher
from preceptor.models.language_model import project
from preceptor.models.loading import load
from preceptor.models.student import make_student
from tests.byte_models import batch_of, tiny

PROMPTS = [(1, 9, 40), (1, 30, 31, 32), (77,), (1, 5)]


def model_of(kind):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, tie_word_embeddings=True
    )
    model = tiny(config, rows=264)
    if kind == "lora":
        model = make_student("lora:rank=2,alpha=8", model, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(3))
    return model.eval()


def loss_of(hidden, head):
    return project(hidden, head).logsumexp(-1).sum()


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.causal.base_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def one_of_two(folder: Path) -> None:
    """What each process does; it stops at the first difference."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    batch = batch_of(9, 5)
    for kind in ("plain", "lora"):
        alone = model_of(kind)
        alone(batch, loss_of).backward()
        expected, answers = gradients(alone), alone.generate(PROMPTS, max_new_tokens=6, temperature=0)
        copied = DistributedDataParallel(model_of(kind))
        copied(batch, loss_of).backward()
        for name, gradient in gradients(copied.module).items():
            torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"DDP {name}: {text}")
        model = sharded(model_of(kind))
        mine = PROMPTS[rank : rank + 2]
        assert model.generate(mine, max_new_tokens=3 + 3 * rank, temperature=0) == [
            answer[: 3 + 3 * rank] for answer in answers[rank : rank + 2]
        ]
        model(batch, loss_of).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"FSDP {name}: {text}")
        assert model.generate(mine, max_new_tokens=3, temperature=0) == [a[:3] for a in answers[rank : rank + 2]]
        said = AdapterOff(model)(batch) if kind == "lora" else FrozenTeacher(model)(batch)
        base = FrozenTeacher(model_of("plain"))(batch)
        torch.testing.assert_close(project(said.hidden, said.head), project(base.hidden, base.head))
        state = {name: whole(value) for name, value in model.state_dict().items()}
        if rank == 0:
            model.save(folder / kind, state=state)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_sample_and_save_what_one_does(tmp_path):
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(root.parent), str(root)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    with torch.no_grad():
        for kind in ("plain", "lora"):
            saved = load(str(tmp_path / kind))
            torch.testing.assert_close(saved(batch_of(9, 5)), model_of(kind)(batch_of(9, 5)), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_of_two(Path(sys.argv[1]))
