"""What depends on the machine: device, precision, compiler, memory, processes; counting FLOPs."""

import os
import resource
import shutil
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data import InputError


def pick_device(name):
    """auto, cpu, cuda or mps -> torch.device; InputError where the machine has none such."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))      # of torchrun, on this machine
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available() and processes == 1}   # gloo has no mps
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if name == "mps" and processes > 1:
        raise InputError("--device mps: several processes train on cpu or cuda alone")
    if name == "cuda" and processes > torch.cuda.device_count() > 0:
        raise InputError(f"--device cuda: this machine has {torch.cuda.device_count()} for "
                         f"{processes} processes; start as many processes, or give --device cpu")
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none that torch can use; "
                         "try --device auto")
    return torch.device(name)


def join_processes():
    """Under torchrun: join the other processes, each with a device of its own where there are GPUs.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():       # else: pick_device
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        cpu = torch.device("cpu")       # measured: all shall do as the first one does
        FAST_BF16["cpu"] = from_first(lambda: fast_bf16(cpu))


def leave_processes():
    """Its threads end here: one that still runs when Python ends may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, 0 where it is alone: the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Print, where this is the process that writes."""
    if rank() == 0:
        print(text, flush=True)


def added(x):
    """A tensor's sum over processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def any_of(*flags):
    """Whether each flag is raised in any process. No device waits: it is on the CPU."""
    return added(torch.tensor([float(bool(flag)) for flag in flags])).bool().tolist()


def from_first(make):
    """What the first process makes, in all of them; an InputError of its own, too."""
    if world() == 1:
        return make()
    made = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except InputError as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1]:
        raise made[1]
    return made[0]


def is_shared(x):
    """Whether processes hold shares of it: a DTensor, whose import would take a second."""
    return hasattr(x, "full_tensor")


def whole(x):
    """A tensor in one piece, where processes hold shares of it; anything else as it is."""
    return x.full_tensor() if is_shared(x) else x


def own(x):
    """The share of a tensor that this process holds."""
    return x.to_local() if is_shared(x) else x


def shared_as(mine, x):
    """A whole tensor -> held as another one is, in shares or not."""
    if not is_shared(mine):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(mine.device), mine.device_mesh, mine.placements)


def precision(device):
    """The context to compute in: bf16 where the machine is fast at it, else fp32."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bf16(device) else nullcontext()


FAST_BF16 = {}      # by kind of device; a run that goes on does so as it began


def fast_bf16(device):
    """Whether bf16 matrix products are worth it; on a CPU measured, once: the best of ten in turns,
    for another program may take the processor at any moment."""
    if device.type not in FAST_BF16:
        if device.type == "cpu":
            seconds, matrix = {}, torch.ones(1024, 512)
            factors = {dtype: (matrix.to(dtype), matrix[:512].to(dtype))
                       for dtype in (torch.float32, torch.bfloat16)}
            for _ in range(10):
                for dtype, (a, b) in factors.items():
                    start = time.perf_counter()
                    a @ b
                    taken = time.perf_counter() - start
                    seconds[dtype] = min(seconds.get(dtype, taken), taken)
            FAST_BF16["cpu"] = seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]
        else:
            FAST_BF16[device.type] = device.type == "cuda" and torch.cuda.is_bf16_supported(
                including_emulation=False)
    return FAST_BF16[device.type]


def compiler_exists(device):
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, compilers)))


def peak_memory(device):
    """Most memory that was in use, in MiB: of a GPU that which torch had, else this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    unit = 1 if sys.platform == "darwin" else 1024      # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20)


def count_flops():
    """torch's counter of FLOPs, which by itself leaves out attention on a CPU."""
    def forward(q, k, v, *_, out_shape=None, **__):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *_, out_shape=None, **__):
        return sdpa_backward_flop_count(grad, q, k, v)
    ops = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward})
