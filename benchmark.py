"""How fast a training step and sampling are, beside what this machine's matrix products can do.

    python train.py mot --benchmark         about two minutes; writes runs/mot/benchmark.json

All is measured in one run, what is compared in turns: a machine is not equally fast at all times.
The weights are untrained, which no duration here depends on.
"""

import statistics
import time

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from machine import count_flops, fast_bf16, peak_memory, say
from scores import fresh_cases

PICTURES = 64           # sampled at a time


def wait(device):
    """Until the device has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(device, run):
    """Seconds that a call takes."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def in_turns(device, runs, rounds, each=1):
    """{name: call} -> {name: median seconds}; in each round every call has `each` turns."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name] += [timed(device, run) for _ in range(each)]
    return {name: statistics.median(taken) for name, taken in seconds.items()}


# --- a training step -----------------------------------------------------------------------------

class Products(TorchDispatchMode):
    """The shapes (m, k, n) of all matrix products within it, and how often each occurs."""

    def __init__(self):
        super().__init__()
        self.shapes = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = arguments[-2:]
            shape = *a.shape, b.shape[1]
            self.shapes[shape] = self.shapes.get(shape, 0) + 1
        return function(*arguments, **(options or {}))


def flops_of(model, batch):
    """FLOPs of a loss and its gradient, and the matrix products among them {(m, k, n): count}."""
    with count_flops() as counter, Products() as products:
        model.loss(batch)[0].backward()
    model.zero_grad()
    return counter.get_total_flops(), products.shapes


def matmul_peak(shapes, device):
    """FLOP/s of bare matrix products of these shapes -> {"fp32": FLOP/s, "bf16": FLOP/s}."""
    peaks = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        work = seconds = 0
        for (m, k, n), count in shapes.items():
            a = torch.randn(m, k, device=device, dtype=dtype)
            b = torch.randn(k, n, device=device, dtype=dtype)
            taken = min(timed(device, lambda a=a, b=b: a @ b) for _ in range(10))
            work, seconds = work + 2 * m * k * n * count, seconds + taken * count
        peaks[name] = work / seconds
    return peaks


def measure_steps(trainers, batches, device, rounds=8):
    """{name: Trainer} over one stream of batches, the dense model first -> what a step of each
    costs, and what matrix products of the first one's shapes reach alone.
    """
    batch = next(batches).to(device)
    counted = {name: flops_of(trainer.model, batch) for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.compile()
        trainer.train_step()
    seconds = in_turns(device, {name: trainer.train_step for name, trainer in trainers.items()},
                       rounds, each=5)
    drawing = in_turns(device, {"": lambda: next(batches).to(device)}, 20)[""]
    peak = matmul_peak(next(iter(counted.values()))[1], device)
    used = peak["bf16" if fast_bf16(device) else "fp32"]
    tokens = batch.tokens.numel()
    return {name: {"ms_per_step": 1e3 * taken, "tokens_per_second": tokens / taken,
                   "flops_per_step": counted[name][0],
                   "flops_per_second": counted[name][0] / taken,
                   "share_of_peak": counted[name][0] / taken / used,
                   "data_share": drawing / taken} for name, taken in seconds.items()
            } | {"matmul_peak": peak}


# --- sampling ------------------------------------------------------------------------------------

class Uncached:
    """Stands for a model's `forward`: what its caches would keep is computed anew in each call.

    The rows of a prompt must be equally long; `cache.lengths` still says how much of them was kept.
    """

    def __init__(self, model):
        self.model, self.forward, self.kept = model, model.forward, {}

    def __call__(self, batch, *arguments):
        *times, cache = arguments                       # Transfusion's forward has times, too
        cache.used = int(cache.lengths.max()) + batch.tokens.shape[1]
        batch = whole(batch)
        if not cache.lengths.any():
            self.kept[cache] = [batch]
            return self.forward(batch, *times)
        before, hidden = self.kept[cache], []
        B = len(before[0].tokens)
        if len(cache.lengths) > B * len(before):        # doubled: the null branch of guidance
            before.append(before[0])
        for number, rows in enumerate(torch.arange(len(cache.lengths)).split(B)):
            part = batch._replace(**{name: getattr(batch, name)[rows] for name in POSITIONS})
            before[number], clean = self.after(before[number], int(cache.lengths[rows[0]]), part,
                                               times)
            hidden.append(self.forward(before[number], *clean)[:, -batch.tokens.shape[1]:])
        return torch.cat(hidden)

    def after(self, before, length, batch, times):
        """A batch behind the first `length` positions of another -> that batch, [its times]."""
        B, device = len(batch.tokens), batch.tokens.device
        later = batch._replace(span=batch.span + before.span.max() * (batch.span > 0))
        joined = {name: torch.cat([getattr(before, name)[:, :length], getattr(later, name)], 1)
                  for name in POSITIONS}
        signals, clean = [None] * 4, [None] * 4
        for kind in range(1, 4):
            n = int((joined["modality"][0, :length] == kind).sum())
            old = before.signals[kind] if n else None
            new = batch.signals[kind]
            spans = [] if old is None else [
                old.unflatten(0, (B, -1))[:, :n // self.model.span_lengths[kind]]]
            t = [torch.zeros(x.shape[:2], device=device) for x in spans]
            if new is not None:
                spans, t = [*spans, new[:, None]], [*t, times[0][kind][:, None]]
            if spans:
                signals[kind], clean[kind] = (torch.cat(x, 1).flatten(0, 1) for x in (spans, t))
        order = joined["modality"].flatten().argsort(stable=True)
        sizes = tuple(torch.bincount(joined["modality"].flatten(), minlength=4).tolist())
        return batch._replace(**joined, order=order, inverse=order.argsort(), sizes=sizes,
                              signals=tuple(signals)), [clean] * len(times)


POSITIONS = ("tokens", "modality", "span", "place", "document")     # fields of a batch, (B, T)


def whole(batch):
    """A step of `generate` with every field: those that its model does not read are left out."""
    modality = torch.empty_like(batch.order)            # what a step says by its order and sizes
    modality[batch.order] = torch.arange(4, device=modality.device).repeat_interleave(
        torch.tensor(batch.sizes, device=modality.device))
    fields = {name: torch.zeros_like(batch.tokens) for name in ("span", "place")
              if getattr(batch, name).shape != batch.tokens.shape}
    return batch._replace(modality=modality.view(batch.tokens.shape), **fields)


def measure_sampling(systems, size, length, device, rounds=3):
    """{name: System} -> {what is made: {name: seconds}}, the first of them also without caches.

    Made are PICTURES pictures of one caption, and as many rows of words, `length` positions each.
    """
    _, (caption,), _ = fresh_cases("image", 1, np.random.default_rng(0), size)
    prompts = [("text", caption)] * PICTURES

    def draw(system):
        return lambda: system.follow(prompts, "image")

    def write(system):      # a row has room for a span at its end, which these weights never open
        room = length - len(system.tokenizer.encode(caption)) - 3 - max(system.positions)
        room = max(room, 1)
        return lambda: system.complete([[prompt] for prompt in prompts], spans=0, new_text=room)
    name, found = next(iter(systems)), {}
    for what, make in (("pictures", draw), ("words", write)):
        runs = {name: make(system) for name, system in systems.items()}
        found[what] = in_turns(device, runs, rounds)
        systems[name].model.forward = Uncached(systems[name].model)
        found[what]["without caches"] = timed(device, runs[name])
        del systems[name].model.forward
    return found


# --- the report ----------------------------------------------------------------------------------

def report(trainers, batches, systems, device, size):
    """Measure and print it all -> the contents of benchmark.json."""
    length, found = next(batches).tokens.shape[1], {}
    sampled = measure_sampling(systems, size, length, device)       # while nothing is trained
    steps = measure_steps(trainers, batches, device)
    peak = steps.pop("matmul_peak")
    say("matrix products of a step's shapes, alone: "
        + ", ".join(f"{value / 1e9:.0f} GFLOP/s in {dtype}" for dtype, value in peak.items()))
    for name, row in steps.items():
        say(f"{name:<16}{row['ms_per_step']:8.1f} ms a step, {row['tokens_per_second']:9,.0f} "
            "positions a second, "
            f"{row['flops_per_step'] / 1e9:.1f} GFLOPs a step, {row['flops_per_second'] / 1e9:.0f} "
            f"GFLOP/s: {row['share_of_peak']:.0%} of the peak; batches {row['data_share']:.1%}")
    dense, mot = (row["ms_per_step"] for row in steps.values())
    found["mot_over_dense"] = mot / dense
    say(f"a step of MoT takes {found['mot_over_dense']:.2f} times that of the dense model")
    found["cached_speedup"] = {}
    for what, seconds in sampled.items():
        called = what if what == "pictures" else f"rows of {length} positions, words alone"
        cached, _, uncached = seconds.values()
        found["cached_speedup"][what] = uncached / cached
        say(f"{PICTURES} {called}: "
            + ", ".join(f"{name} {taken:.2f} s ({PICTURES / taken:.0f} a second)"
                        for name, taken in seconds.items())
            + f"; caches make it {uncached / cached:.1f} times as fast")
    return {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "bf16": fast_bf16(device), "matmul_peak": peak, "steps": steps, "sampling": sampled,
            "pictures_per_second": {name: PICTURES / taken
                                    for name, taken in sampled["pictures"].items()},
            **found, "peak_memory_mib": peak_memory(device)}
