"""What depends on the machine: its device, precision, compiler, memory; and counting FLOPs."""

import os
import resource
import shutil
import sys
import time
from contextlib import nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data import InputError


def pick_device(name):
    """auto, cpu, cuda or mps -> torch.device; InputError where the machine has none such."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none that torch can use; "
                         "try --device auto")
    return torch.device(name)


def precision(device):
    """The context to compute in: bf16 where the machine is fast at it, else fp32."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bf16(device) else nullcontext()


def fast_bf16(device, known={}):
    """Whether bf16 matrix products are worth it; on a CPU measured, once, in a few milliseconds."""
    if device.type not in known:
        if device.type == "cpu":
            seconds = {}
            for dtype in (torch.float32, torch.bfloat16):
                a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
                for _ in range(3):
                    start = time.perf_counter()
                    a @ b
                    taken = time.perf_counter() - start
                    seconds[dtype] = min(seconds.get(dtype, taken), taken)
            known["cpu"] = seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]
        else:
            known[device.type] = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return known[device.type]


def compiler_exists(device):
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, compilers)))


def peak_memory():
    """Peak resident memory of this process, in MiB."""
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
