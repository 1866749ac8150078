"""The trainer of all four systems: any model with `loss(batch, totals) -> (scalar, {name: scalar})`
and `totals(batch)`, what its loss divides by.

AdamW or Muon, warm-up and cosine, clipping, averaged weights, a log of every loss, and a state from
which a run goes on exactly. It knows nothing of worlds, nor of files but its own log.
"""

import copy  # noqa: I001 (long imports are wrapped, not one name a line)
import itertools
import json
import math
import os
import platform
import re
import signal
import time
from contextlib import nullcontext, suppress

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

from data import InputError, to_signal
from machine import (added, any_of, compiler_exists, count_flops, fast_bf16, own, peak_memory,
                     precision, rank, say, shared_as, whole, world)
from muon import Muon

PAYS = 1000         # steps from which on a run is compiled: it takes half a minute on a CPU
SHOWN = ("text", "image", "audio", "video", "reconstruction")      # losses beside the progress bar


class Trainer:
    """AdamW (0.9, 0.95), or Muon for the matrices of blocks, warm-up, cosine, clip 1.0, averaged
    weights; any such model.

    Within a step nothing waits for the device: losses stay on it, read every `log_every` steps.
    Under torchrun every process computes its parts of each batch; the first one writes. With
    `sharded` each process keeps a share of every weight, and of all that belongs to it (FSDP).
    """

    def __init__(self, model, batches, config, device, out, compiled=True, log_every=50,
                 sharded=False):
        self.model, self.batches, self.config, self.sharded = model, batches, config, sharded
        self.device, self.out, self.log_every, self.compiled = device, out, log_every, compiled
        self.step, self.seconds, self.loss = 0, 0.0, model.loss
        # its weights want gradients, as of others autocast does not keep the bf16 copies
        self.averaged = copy.deepcopy(model).eval()
        called = Called(model, lambda *arguments: self.loss(*arguments))
        if sharded:
            mesh = dist.init_device_mesh(device.type, (world(),))
            for block in itertools.chain(model.blocks, self.averaged.blocks):
                fully_shard(block, mesh=mesh)
            self.together = fully_shard(called, mesh=mesh)
            fully_shard(self.averaged, mesh=mesh)
            for method in ("generate", "loss"):     # bring weights together, as forward does
                register_fsdp_forward_method(self.averaged, method)
        else:
            model.to(device)
            self.averaged.to(device)
            self.together = world() > 1 and DistributedDataParallel(
                called, broadcast_buffers=False, find_unused_parameters=True)   # absent modalities
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = set()
        if config.optimizer == "muon":
            hidden = getattr(model, "blocks", model)    # an autoencoder has no embeddings
            matrices = {p for p in hidden.parameters() if p.requires_grad and p.ndim > 1}
        self.optimizers = [torch.optim.AdamW(
            [p for p in self.parameters if p not in matrices], lr=config.lr, betas=(0.9, 0.95),
            weight_decay=config.weight_decay, fused=True)]
        # 1 once a loss was not finite: from then on, and without a wait, no step changes a weight
        self.failed = torch.zeros((), device=device)
        self.optimizers[0].found_inf = (DTensor.from_local(self.failed, mesh, [Replicate()])
                                        if sharded else self.failed)
        if matrices:
            self.optimizers.append(Muon([p for p in self.parameters if p in matrices],
                                        config.lr, config.weight_decay))
            self.optimizers[1].found_inf = self.failed

    def compile(self):
        """torch.compile where a compiler exists and it pays; else the same code, uncompiled."""
        if not self.compiled or self.config.steps < max(PAYS, self.step + 1):
            return
        if self.sharded:
            say("--fsdp: running uncompiled")
            return
        if self.device.type == "mps":
            return
        if not compiler_exists(self.device):
            say("no compiler found (g++ or clang++): running uncompiled, which is slower")
            return
        start, state = time.time(), copy.deepcopy(self.batches.state)
        try:
            self.loss = torch.compile(self.model.loss, dynamic=False)
            batch = next(self.batches).to(self.device)
            with precision(self.device):
                self.loss(batch, self.model.totals(batch))[0].backward()
            say(f"compiled in {time.time() - start:.0f} s")
        except Exception as error:      # no working compiler: slower, not wrong
            self.loss = self.model.loss
            say(f"torch.compile failed ({type(error).__name__}); running without it")
        self.model.zero_grad()
        self.batches.state = state      # the batch above never happened

    @property
    def samples(self):
        """Whether this process samples: the first, which writes, and all that hold shares."""
        return rank() == 0 or self.sharded

    def learning_rate(self):
        """Linear warm-up, then half a cosine down to a hundredth of the peak."""
        warmup = max(1, min(self.config.warmup, self.config.steps // 5))
        done = max(0, self.step - warmup) / max(1, self.config.steps - warmup)
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.config.lr * min(1.0, (self.step + 1) / warmup) * fall

    def gradients(self):
        """Draw a batch and compute its gradient -> its losses, still on the device.

        Both are done in parts, `accumulate` of them in each process, that add up to the batch.
        """
        numbers, batches, losses = range(self.config.accumulate * world()), {}, []
        for number in numbers:
            if number % world() == rank():
                batches[number] = next(self.batches).to(self.device)
            else:
                self.batches.skip()
        totals = added(sum(map(self.model.totals, batches.values())))
        for number, batch in batches.items():
            seed_everything(self.config.seed, self.step, number)
            with precision(self.device), self.unaveraged(number + world() <= numbers[-1]):
                loss, parts = (self.together or self.loss)(batch, totals)
                (loss * world()).backward()     # of which processes take the mean
            losses.append({"loss": loss.detach(), **parts})
        return {**merged(losses), "loss": added(sum(row["loss"] for row in losses))}

    def unaveraged(self, more):
        """The context of a part after which `more` come: gradients are averaged in the last."""
        if self.sharded:
            self.together.set_requires_gradient_sync(not more)
            return nullcontext()
        return self.together.no_sync() if more and self.together else nullcontext()

    def train_step(self):
        """One step -> its losses, still on the device."""
        lr = self.learning_rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        losses = self.gradients()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.failed.copy_((self.failed + ~(losses["loss"] + norm).isfinite()) > 0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 9))   # short at first: drop the start
        with torch.no_grad():
            torch._foreach_lerp_(list(map(own, self.averaged.parameters())),
                                 list(map(own, self.model.parameters())), 1 - decay)
            for kept, buffer in zip(self.averaged.buffers(), self.model.buffers()):
                kept.copy_(buffer)
        return {**losses, "gradient_norm": norm}

    def train(self, title, save, every=0, at_each=None, how="the same command and --resume"):
        """Run to the last step; `save()` there, once a minute and every `save_every` steps,
        `at_each()` every `every` steps but the last. Ctrl-C and SIGTERM finish the step, save, and
        raise KeyboardInterrupt, which says `how` to go on.
        """
        self.model.train()
        recent, last_save = [], time.time()
        with (open(self.out / "metrics.jsonl" if rank() == 0 else os.devnull, "a",
                   encoding="utf-8") as log, Asked() as to_stop,
              tqdm(total=self.config.steps, initial=self.step, desc=title, unit="step",
                   mininterval=1, dynamic_ncols=True, disable=rank() > 0) as bar):
            start = time.monotonic()
            while self.step < self.config.steps:
                recent.append(self.train_step())
                bar.update()
                stopping, late = any_of(to_stop, time.time() - last_save > 60)
                last = self.step == self.config.steps
                saving = last or stopping or late or self.step % self.config.save_every == 0
                logging = last or self.step % self.log_every == 0
                if (saving or logging) and self.failed:                 # seen before it is saved
                    self.explain(recent)
                if logging:
                    row, recent = as_numbers(merged(recent)), []        # waits for the device
                self.seconds += time.monotonic() - start
                if logging:
                    log.write(json.dumps({"step": self.step, "lr": self.learning_rate(),
                                          "seconds": round(self.seconds, 2), **row}) + "\n")
                    log.flush()
                    bar.set_postfix({name: f"{row[name]:.3f}" for name in SHOWN if row.get(name)})
                if saving:
                    save()
                    last_save = time.time()
                if stopping:
                    raise KeyboardInterrupt(f"stopped at step {self.step}; to go on, give {how}")
                if every and self.step % every == 0 and not last:
                    if self.samples:
                        at_each()
                    if self.sharded:                    # what lies in no block was left whole
                        self.averaged.reshard()
                start = time.monotonic()
        self.model.eval()

    def explain(self, rows):
        """Raise InputError about the first of the last steps whose loss was not finite."""
        for step, row in enumerate(rows, self.step - len(rows)):
            if not (row["loss"] + row["gradient_norm"]).isfinite():
                self.step = step
                shown = [name for name in (*SHOWN, "gradient_norm") if name in row]
                broken = [name for name in row if name != "loss" and "_noise_" not in name
                          and not row[name].isfinite()]     # no nan but a level that none had
                terms = [f"{name} {row[name].item():.3g}"
                         for name in dict.fromkeys([*broken, *shown])]
                raise InputError(f"the loss is {row['loss'].item():.3g} at step {step + 1} "
                                 f"({', '.join(terms)}), learning rate {self.learning_rate():.2g}: "
                                 "try a lower --lr; the last checkpoint is kept")

    def state(self, everywhere=True):
        """All that going on exactly needs, in however many processes: weights are whole in it, off
        the device. everywhere=False: in the first process; the others help to make it."""
        def keep(x):            # one at a time: no device need hold all of them
            if isinstance(x, torch.Tensor):
                x = whole(x)
                x = x.cpu() if everywhere or rank() == 0 else None
            return x
        return {"step": self.step, "seconds": self.seconds, "stream": self.batches.state,
                **tree_map(keep, {"model": self.model.state_dict(),
                                  "ema": self.averaged.state_dict(),
                                  "optimizers": [optimizer.state_dict()
                                                 for optimizer in self.optimizers]})}

    def resume(self, saved):
        for module, kept in ((self.model, saved["model"]), (self.averaged, saved["ema"])):
            module.load_state_dict({name: shared_as(mine, kept[name])
                                    for name, mine in module.state_dict().items()})
        for optimizer, kept in zip(self.optimizers, saved["optimizers"], strict=True):
            moments = {number: {name: shared_as(parameter, x) if x.dim() else x
                                for name, x in kept["state"][number].items()}
                       for number, parameter in enumerate(optimizer.param_groups[0]["params"])
                       if number in kept["state"]}
            optimizer.load_state_dict({**kept, "state": moments})
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.batches.state = saved["stream"]
        if rank() > 0:
            return
        log, rows = self.out / "metrics.jsonl", []
        if log.is_file():               # whose last row may be torn
            with suppress(json.JSONDecodeError):
                for row in log.read_text(encoding="utf-8").splitlines(keepends=True):
                    if json.loads(row)["step"] <= self.step:    # later ones would come twice
                        rows.append(row)
        new = log.with_suffix(".new")
        new.write_text("".join(rows), encoding="utf-8")
        os.replace(new, log)


class Called(torch.nn.Module):
    """A model that is called for its loss: what DistributedDataParallel and FSDP take."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.forward = model, loss


class Asked:
    """Within it Ctrl-C and SIGTERM only ask to stop, so that a step is finished; a second Ctrl-C is
    at once (a second SIGTERM is not: clusters send it to a process and to what started it)."""

    def __init__(self):
        self.asked = False

    def __bool__(self):
        return self.asked

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, _):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is kept")
        self.asked = True


def seed_everything(*numbers):
    """Noise is a function of seed, step and part, so that a run goes on exactly, wherever it was
    stopped and whatever was drawn in between."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def merged(rows):
    """Losses of several steps, or of the parts of a batch -> their means, still on the device."""
    if len(rows) == 1:
        return rows[0]
    names = dict.fromkeys(name for row in rows for name in row)     # some may lack a modality
    stacks = {name: torch.stack([row[name].float() for row in rows if name in row])
              for name in names}
    sound = stacks["loss"].isfinite().all()     # then nan is a level of noise that none had
    return {name: torch.where(sound, stack.nanmean(), stack.mean())
            for name, stack in stacks.items()}


def as_numbers(losses):
    """Losses off the device, as floats; None for nan (a level of noise that none had)."""
    return {name: value.item() if value.isfinite() else None for name, value in losses.items()}


class Signals:
    """An endless stream of batches of stored signals for an autoencoder, each once an epoch."""

    def __init__(self, stored, batch_size, seed, as_picture):
        """as_picture: what makes pictures of a batch of signals."""
        self.stored, self.batch_size, self.seed, self.state = stored, batch_size, seed, {"drawn": 0}
        self.as_picture = as_picture

    def __iter__(self):
        return self

    def __next__(self):
        numbers = np.arange(self.state["drawn"], self.state["drawn"] + self.batch_size)
        self.state["drawn"] += self.batch_size
        epochs, places = np.divmod(numbers, len(self.stored))
        orders = {e: np.random.default_rng((self.seed, e)).permutation(len(self.stored))
                  for e in set(epochs.tolist())}
        index = [orders[e][place] for e, place in zip(epochs.tolist(), places)]
        pictures = self.as_picture(to_signal(self.stored[index]))
        return pictures.contiguous(memory_format=torch.channels_last)

    def skip(self):
        self.state["drawn"] += self.batch_size


# --- what report.json says of any run ------------------------------------------------------------

def active_parameters(model):
    """Parameters that one position meets: of an untied part, one copy."""
    return sum(p.numel() for name, p in model.named_parameters()
               if not re.search(r"copies\.[1-9]", name))


def facts(trainer):
    """What report.json says of any run, beside its scores."""
    tokens = flops = 0
    parts = trainer.config.accumulate * world()
    model = trainer.averaged
    for stream, share in getattr(trainer.batches, "kinds", [(trainer.batches, 1.0)]):
        batch, share = next(stream), share * parts
        tokens += (batch.tokens.numel() if hasattr(batch, "tokens") else len(batch)) * share
        with count_flops() as counter:
            model.loss(batch.to(trainer.device))[0].backward()
        flops += counter.get_total_flops() * share
    model.zero_grad()
    return {"seed": trainer.config.seed, "torch": torch.__version__,
            "python": platform.python_version(), "device": str(trainer.device),
            "bf16": fast_bf16(trainer.device),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "active_parameters": active_parameters(trainer.model), "steps": trainer.step,
            "tokens": round(tokens * trainer.step), "flops": round(flops * trainer.step),
            "train_seconds": round(trainer.seconds, 1),
            "tokens_per_second": round(tokens * trainer.step / max(trainer.seconds, 1e-9)),
            "peak_memory_mib": peak_memory(trainer.device)}
