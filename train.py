"""Train any of the four systems: one trainer, one command line.

    python train.py mot                 captions become pictures, pictures become captions
    python train.py transfusion         the same, all weights shared
    python train.py chameleon           the same, everything a discrete token
    python train.py vqvae               the tokenizer alone
    python train.py mot --data FOLDER   your own pictures (FOLDER/metadata.jsonl has the captions)

Writes to runs/NAME: checkpoint.pt, metrics.jsonl, report.json, curves.png, samples.png and
transcript.md. An autoencoder is trained on first use, kept under a name that holds its data and
settings, and reused.
"""

import os

# a thread that waits for another spins only briefly, so that other programs do not stall the run
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse  # noqa: I001 (long imports are wrapped, not one name a line)
import copy
import dataclasses
import hashlib
import inspect
import json
import math
import platform
import re
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import scores
import show
from data import (Batches, InputError, Tokenizer, folder_corpus, good_length, measure,
                  shapes_corpus, to_signal, tokenize)
from sample import (FORMAT, MODELS, Parser, System, build, layout_of, load_autoencoder,
                    load_checkpoint, pick_device, precision, run, write_document)
from transfusion import TransfusionConfig
from vqvae import VQVAE, Codec, VQVAEConfig, code_usage


@dataclass(frozen=True)
class TrainConfig:
    data: str = "shapes"            # a toy world (shapes), or a folder of pictures with captions
    setting: str = "transfusion"    # the host of mot: transfusion or chameleon
    out: str = ""                   # the run's folder (default: runs/ and the run's name)
    steps: int = 0                  # training steps (default: the architecture's own, see PRESETS)
    batch_size: int = 0             # packed rows a step; pictures for vqvae (default: see PRESETS)
    context: int = 0                # positions of a row (default: the shortest that pack well)
    picture_size: int = 32          # pixels of a side; a multiple of 8
    size: str = "tiny"              # of the model: tiny, small or base
    pictures: int = 40_000          # of the toy world, to train on
    seed: int = 0                   # of everything random
    device: str = "auto"            # auto, cpu, cuda or mps
    lr: float = 0.0                 # peak learning rate (default: see PRESETS)
    warmup: int = 100               # steps until the peak; then a cosine down to a hundredth of it
    weight_decay: float = 0.01      # of AdamW
    ema: float = 0.998              # decay of the averaged weights that scores and samples use
    autoencoder_steps: int = 0      # of the autoencoder trained on first use (default: vqvae's)
    cases: int = 512                # held-out cases for each score


# what differs by architecture; and the presets of --size
PRESETS = {"vqvae-kl": {"steps": 1200, "batch_size": 32, "lr": 3e-3},
           "vqvae-vq": {"steps": 2400, "batch_size": 32, "lr": 3e-3},
           "transfusion": {"steps": 6000, "batch_size": 20, "lr": 4e-3},
           "chameleon": {"steps": 4800, "batch_size": 16, "lr": 4e-3}}
SIZES = {"tiny": {}, "small": {"width": 256, "depth": 8, "heads": 8, "hidden": 704},
         "base": {"width": 768, "depth": 12, "heads": 12, "hidden": 2048}}


# --- the trainer ---------------------------------------------------------------------------------

class Trainer:
    """AdamW (0.9, 0.95), warm-up, cosine, clip 1.0, averaged weights; any model with `loss(batch)`.

    Within a step nothing waits for the device: losses stay on it, read every `log_every` steps.
    """

    def __init__(self, model, batches, config, device, out, compiled=True, log_every=50):
        self.model, self.batches, self.config = model.to(device), batches, config
        self.device, self.out, self.log_every, self.compiled = device, out, log_every, compiled
        self.step, self.seconds = 0, 0.0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.95),
                                           weight_decay=config.weight_decay, fused=True)
        self.loss = model.loss

    def compile(self):
        """torch.compile where a compiler exists; else the same code, uncompiled."""
        if not self.compiled or not compiler_exists(self.device):
            return
        start, (state, tensors) = time.time(), (copy.deepcopy(getattr(self.batches, "state", None)),
                                                torch.get_rng_state())
        try:
            self.loss = torch.compile(self.model.loss, dynamic=False)
            batch = next(self.batches).to(self.device)
            with precision(self.device):
                self.loss(batch)[0].backward()
            print(f"compiled in {time.time() - start:.0f} s", flush=True)
        except Exception as error:      # no working compiler: slower, not wrong
            self.loss = self.model.loss
            print(f"torch.compile failed ({type(error).__name__}); running without it", flush=True)
        self.optimizer.zero_grad()
        self.batches.state = state      # the batch and the random numbers above never happened
        torch.set_rng_state(tensors)

    def learning_rate(self):
        """Linear warm-up, then half a cosine down to a hundredth of the peak."""
        warmup = max(1, min(self.config.warmup, self.config.steps // 5))
        done = max(0, self.step - warmup) / max(1, self.config.steps - warmup)
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.config.lr * min(1.0, (self.step + 1) / warmup) * fall

    def train_step(self):
        """One step -> its losses, still on the device."""
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = next(self.batches).to(self.device)
        with precision(self.device):
            loss, parts = self.loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 9))   # short at first: drop the start
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()),
                                 list(self.model.parameters()), 1 - decay)
            for kept, buffer in zip(self.averaged.buffers(), self.model.buffers()):
                kept.copy_(buffer)
        return {"loss": loss.detach(), **parts, "gradient_norm": norm}

    def train(self, title, every=None, at_each=None, save=None):
        """Run to the last step; `at_each()` every `every` steps, `save()` once a minute."""
        self.model.train()
        recent, last_save = [], time.time()
        with (open(self.out / "metrics.jsonl", "a", encoding="utf-8") as log,
              tqdm(total=self.config.steps, initial=self.step, desc=title, unit="step",
                   mininterval=1, dynamic_ncols=True) as bar):
            while self.step < self.config.steps:
                start = time.time()
                recent.append(self.train_step())
                self.seconds += time.time() - start
                bar.update()
                saving = save and time.time() - last_save > 60
                if saving or self.step % self.log_every == 0 or self.step == self.config.steps:
                    row = mean_of(recent)
                    recent = []
                    if not math.isfinite(row["loss"]):      # found before anything is saved
                        raise InputError(f"the loss is {row['loss']} at step {self.step}: "
                                         f"try a lower --lr (it was {self.config.lr}); "
                                         "the last checkpoint is kept")
                    log.write(json.dumps({"step": self.step, "lr": self.learning_rate(),
                                          "seconds": round(self.seconds, 2), **row}) + "\n")
                    log.flush()
                    bar.set_postfix({name: f"{row[name]:.3f}" for name in
                                     ("text", "image", "reconstruction") if row.get(name)})
                if at_each and self.step % every == 0 and self.step < self.config.steps:
                    at_each()
                if saving:
                    save()
                    last_save = time.time()
        self.model.eval()

    def state(self):
        """All that going on exactly needs."""
        return {"step": self.step, "seconds": self.seconds, "model": self.model.state_dict(),
                "ema": self.averaged.state_dict(), "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(), "stream": self.batches.state}

    def resume(self, saved):
        self.model.load_state_dict(saved["model"])
        self.averaged.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.batches.state = saved["stream"]
        torch.set_rng_state(saved["rng"])
        log = self.out / "metrics.jsonl"        # rows that no checkpoint holds would come twice
        rows = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        log.write_text("".join(row + "\n" for row in rows if json.loads(row)["step"] <= self.step),
                       encoding="utf-8")


def mean_of(rows):
    """Losses of several steps -> their means, as floats; nan (an empty noise level) is left out."""
    means = {name: torch.stack([row[name].float() for row in rows]) for name in rows[0]}
    means = {name: (values.mean() if name == "loss" else values.nanmean()).item()
             for name, values in means.items()}
    return {name: value if name == "loss" or math.isfinite(value) else None
            for name, value in means.items()}


def compiler_exists(device):
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return device.type == "cuda" or (device.type == "cpu" and any(map(shutil.which, compilers)))


class Pictures:
    """An endless stream of batches of signals for the autoencoder, each once an epoch."""

    def __init__(self, pixels, batch_size, seed):
        self.pixels, self.batch_size, self.seed, self.state = pixels, batch_size, seed, {"drawn": 0}

    def __iter__(self):
        return self

    def __next__(self):
        numbers = np.arange(self.state["drawn"], self.state["drawn"] + self.batch_size)
        self.state["drawn"] += self.batch_size
        epochs, places = np.divmod(numbers, len(self.pixels))
        orders = {e: np.random.default_rng((self.seed, e)).permutation(len(self.pixels))
                  for e in set(epochs.tolist())}
        index = [orders[e][place] for e, place in zip(epochs.tolist(), places)]
        return to_signal(self.pixels[index]).contiguous(memory_format=torch.channels_last)


# --- the autoencoder -----------------------------------------------------------------------------

def train_autoencoder(corpus, held_out, model_config, config, device, data_name, folder=None):
    """Train an autoencoder on a corpus's pictures, or load one that was -> (VQVAE, its folder)."""
    pixels = corpus.signals["image"]
    key = {"data": hashlib.sha256(pixels.tobytes()).hexdigest(),
           "model": dataclasses.asdict(model_config), "steps": config.steps,
           "batch_size": config.batch_size, "lr": config.lr, "seed": config.seed}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(folder or f"runs/vqvae-{model_config.bottleneck}-{data_name}-{digest}")
    path = folder / "checkpoint.pt"
    kept = load_checkpoint(path) if path.is_file() else {}
    if kept.get("key") == key:
        print(f"autoencoder: {folder} (trained before)", flush=True)
        return load_autoencoder(kept["autoencoder"]).to(device), folder
    make_folder(folder)
    torch.manual_seed(config.seed)
    start = time.time()
    config = dataclasses.replace(config, ema=0.0, weight_decay=0.01, warmup=50)
    trainer = Trainer(VQVAE(model_config), Pictures(pixels, config.batch_size, config.seed), config,
                      device, folder, compiled=False)
    trainer.train(f"autoencoder ({model_config.bottleneck})")
    model = trainer.model
    sample = to_signal(pixels[:4000]).to(device)
    with torch.no_grad(), precision(device):
        model.fit_scale(sample)
    report = autoencoder_report(model, corpus, held_out, config, device, data_name, trainer,
                                time.time() - start)
    save_checkpoint(path, {"format": FORMAT, "arch": "vqvae", "key": key,
                           "autoencoder": packed(model)})
    write_json(folder / "report.json", report)
    show.curves(folder / "metrics.jsonl", folder / "curves.png", f"{folder.name}: training losses")
    pictures = sample[:12] if held_out is None else (
        to_signal(held_out.signals["image"][:12]).to(device))
    with torch.no_grad(), precision(device):
        rebuilt = model(pictures)
    show.reconstructions(pictures.cpu(), rebuilt.cpu(), folder / "samples.png",
                         f"{folder.name}: reconstructions, "
                         f"PSNR {report['reconstruction_psnr']:.1f} dB")
    return model, folder


def autoencoder_report(model, corpus, held_out, config, device, data_name, trainer, wall):
    """report.json of an autoencoder: its reconstructions, and how many of its codes are in use."""
    roundtrip = Roundtrip(model, device)
    report = {"arch": "vqvae", "setting": model.config.bottleneck, "data": data_name,
              **facts(trainer, wall)}
    if held_out is None:
        report |= scores.score_reconstruction(roundtrip, config.cases, size=model.config.size[0])
    else:
        pictures = to_signal(held_out.signals["image"][:config.cases])
        report |= {"reconstruction_psnr": scores.psnr(roundtrip(pictures), pictures),
                   "reconstruction_psnr_n": len(pictures)}
    if model.config.bottleneck == "vq":
        codes = encode_all(model, corpus.signals["image"], device)
        report["perplexity"], report["codes_used"] = code_usage(codes, model.config.codes)
    return report


class Roundtrip:
    def __init__(self, model, device):
        self.model, self.device = model, device

    @torch.no_grad()
    def __call__(self, pictures):
        with precision(self.device):
            return torch.cat([self.model(part.to(self.device)).cpu()
                              for part in pictures.split(512)])


def encode_all(model, pixels, device):
    """All pictures of a corpus -> their codes or latents, once, before training; on the CPU."""
    with torch.no_grad(), precision(device):
        return torch.cat([model.encode(to_signal(pixels[i:i + 512]).to(device)).cpu()
                          for i in range(0, len(pixels), 512)])


# --- what a run writes ---------------------------------------------------------------------------

def make_folder(folder):
    """Make a run's folder, empty of metrics; InputError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    except OSError as error:
        raise InputError(f'--out: "{folder}" cannot be written ({error.strerror})') from None


def check_folder(folder, arch, setting):
    """The checkpoint that a run's folder holds, or None. InputError where the folder could not be
    written, or holds a run of another kind: said before the work, not after."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f'--out: "{folder}" cannot be written')
    if not (folder / "checkpoint.pt").is_file():
        return None
    kept = load_checkpoint(folder)
    if kept["arch"] != arch or kept.get("setting", setting) != setting:
        raise InputError(f'--out: "{folder}" holds a run of {kept["arch"]} '
                         f'({kept.get("setting", "an autoencoder")}), which this one would '
                         "overwrite; give another --out, or remove it")
    return kept


def save_checkpoint(path, contents):
    """Written beside and renamed, so that a run that dies while saving leaves the old one whole."""
    torch.save(contents, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def packed(autoencoder):
    return {"config": dataclasses.asdict(autoencoder.config), "weights": autoencoder.state_dict()}


def write_json(path, contents):
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def active_parameters(model):
    """Parameters that one position meets: of an untied part, one copy."""
    return sum(p.numel() for name, p in model.named_parameters()
               if not re.search(r"copies\.[1-9]", name))


def facts(trainer, wall):
    """What report.json says of any run, beside its scores."""
    batch = next(trainer.batches)
    positions = batch.tokens.numel() if hasattr(batch, "tokens") else len(batch)
    with FlopCounterMode(display=False) as counter:
        trainer.model.loss(batch.to(trainer.device))[0].backward()
    trainer.model.zero_grad()
    return {"seed": trainer.config.seed, "torch": torch.__version__,
            "python": platform.python_version(), "device": str(trainer.device),
            "bf16": not isinstance(precision(trainer.device), nullcontext),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "active_parameters": active_parameters(trainer.model), "steps": trainer.step,
            "tokens": positions * trainer.step, "flops": counter.get_total_flops() * trainer.step,
            "train_seconds": round(trainer.seconds, 1), "wall_seconds": round(wall, 1),
            "tokens_per_second": round(positions * trainer.step / max(trainer.seconds, 1e-9)),
            "peak_memory_mib": peak_memory()}


def peak_memory():
    """Peak resident memory of this process, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024      # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20)


# --- the runs ------------------------------------------------------------------------------------

def load_data(config):
    """--data -> (name, training Corpus, held-out Corpus or None: toy worlds draw theirs fresh)."""
    if config.data == "shapes":
        rng = np.random.default_rng(config.seed)
        return "shapes", shapes_corpus(rng, config.pictures, config.picture_size), None
    corpus, held_out = folder_corpus(config.data, config.picture_size)
    name = re.sub(r"\W+", "-", Path(config.data).resolve().name)
    return f"{name}-folder" if name == "shapes" else name, corpus, held_out


def train_vqvae(config, model_options):
    """python train.py vqvae"""
    device = pick_device(config.device)
    name, corpus, held_out = load_data(config)
    model_config = autoencoder_config(config, **{"bottleneck": "vq", **model_options})
    config = with_presets(config, f"vqvae-{model_config.bottleneck}")
    if config.out:
        check_folder(Path(config.out), "vqvae", model_config.bottleneck)
    _, folder = train_autoencoder(corpus, held_out, model_config, config, device, name,
                                  config.out or None)
    finish(folder)


def autoencoder_config(config, **options):
    return VQVAEConfig(size=(config.picture_size, config.picture_size), **options)


def with_presets(config, name):
    """The config with what was not given filled in from PRESETS."""
    return dataclasses.replace(config, **{option: value for option, value in PRESETS[name].items()
                                          if not getattr(config, option)})


def train_transformer(arch, config, model_options, resume=False):
    """python train.py chameleon, transfusion or mot"""
    begun, setting = time.time(), config.setting if arch == "mot" else arch
    device, (name, corpus, held_out) = pick_device(config.device), load_data(config)
    folder = Path(config.out or "runs/" + "-".join(
        [arch] + ["chameleon"] * (arch == "mot" and setting == "chameleon")
        + [name] * (name != "shapes")))
    kept = check_folder(folder, arch, setting)
    saved = (kept or load_checkpoint(folder)) if resume else None
    config = with_presets(config, setting)
    model, batches, codecs, about = prepare(arch, setting, config, model_options, corpus, held_out,
                                            name, device)
    trainer = Trainer(model, batches, config, device, folder)
    if saved:
        if saved.get("merges") != about["merges"]:
            raise InputError(f'--resume: "{folder}" was trained with other captions; '
                             "give the same data, or another --out")
        for part in ("data", "config", "autoencoder_run"):
            if saved.get(part) != about[part]:
                raise InputError(f'--resume: "{folder}" was trained with {part} {saved.get(part)}, '
                                 f"this run has {about[part]}; "
                                 "give the same options, or another --out")
        trainer.resume(saved)
    else:
        make_folder(folder)
    trainer.compile()
    system = System(trainer.averaged, codecs, Tokenizer(about["merges"]), device)

    def progress():
        (folder / "progress").mkdir(exist_ok=True)
        state = torch.get_rng_state()       # looking must not change what comes after
        show.sheet(system, folder / "progress" / f"step-{trainer.step:06d}.png",
                   f"{arch}, step {trainer.step}", held_out, count=4)
        torch.set_rng_state(state)

    def save():
        save_checkpoint(folder / "checkpoint.pt", {**about, **trainer.state()})

    called = f"{arch} ({setting})" if arch == "mot" else arch
    trainer.train(called, max(1, config.steps // 4), progress, save)
    save()
    report = {"arch": arch, "setting": setting, "data": name, **facts(trainer, 0)}
    report |= (scores.score_shapes(system, config.cases) if held_out is None
               else scores.score_folder(system, held_out, config.cases))
    report["wall_seconds"] = round(time.time() - begun, 1)
    write_json(folder / "report.json", report)
    title = f"{called}, {name}, {trainer.step} steps, seed {config.seed}"
    show_run(system, folder, title, held_out, config.seed)
    finish(folder)


def prepare(arch, setting, config, model_options, corpus, held_out, name, device):
    """Tokenize everything once -> (model, batches, codecs, what a checkpoint says of them)."""
    _, config_class, bottleneck = MODELS[arch, setting]
    model_config = config_class(**{**SIZES[config.size], **model_options})
    if model_config.width % (2 * model_config.heads):
        raise InputError(f"--width {model_config.width} does not split into {model_config.heads} "
                         "heads of even width; change --width or --heads")
    kept = dataclasses.replace(config, steps=config.autoencoder_steps, batch_size=0, lr=0.0)
    kept = with_presets(kept, f"vqvae-{bottleneck}")
    autoencoder, autoencoder_run = train_autoencoder(
        corpus, held_out, autoencoder_config(config, bottleneck=bottleneck), kept, device, name)
    codecs = {"image": Codec("image", autoencoder)}
    encoded = {name: encode_all(codec, corpus.signals[name], device)
               for name, codec in codecs.items()}
    tokenizer = Tokenizer.train(corpus.texts())
    layout = layout_of(tokenizer, codecs)
    torch.manual_seed(config.seed)
    model = build(arch, setting, dataclasses.asdict(model_config), layout)
    positions = [model.positions(kind) if shape else 0 for kind, shape in enumerate(layout.shapes)]
    context = config.context or good_length(
        [measure(tokenize(document, tokenizer), positions) for document in corpus.documents])
    batches = Batches(corpus, tokenizer, layout, encoded, positions, config.batch_size,
                      context, config.seed)
    about = {"format": FORMAT, "arch": arch, "setting": setting, "data": name, "mot": None,
             "config": dataclasses.asdict(model_config), "train": dataclasses.asdict(config),
             "merges": [list(pair) for pair in tokenizer.merges],
             "autoencoders": {name: packed(codec.autoencoder) for name, codec in codecs.items()},
             "autoencoder_run": autoencoder_run.name}
    return model, batches, codecs, about


def show_run(system, folder, title, held_out, seed):
    """curves.png, samples.png and transcript.md of a finished run."""
    show.curves(folder / "metrics.jsonl", folder / "curves.png", title)
    show.sheet(system, folder / "samples.png", title, held_out)
    torch.manual_seed(seed)
    free = system.complete([[]], spans=3, temperature=1.0)[0]
    write_document(free, folder / "transcript.md")


def finish(folder):
    """Print the scores, and where to look."""
    report = json.loads((folder / "report.json").read_text())
    for name, value in report.items():
        if f"{name}_n" in report:
            print(f"{name:<28}{value:8.3f}   ({report[f'{name}_n']} cases)")
        elif name in ("perplexity", "codes_used", "wall_seconds", "peak_memory_mib"):
            print(f"{name:<28}{value:8.3f}")
    print(f"see {folder}/: " + ", ".join(sorted(path.name for path in folder.iterdir())))


# --- command line --------------------------------------------------------------------------------

def options_of(config_class):
    """(name, type, default, help) of a config's plain fields; help is the field's comment."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.+)$", inspect.getsource(config_class), re.M))
    return [(field.name, field.type, field.default, comments[field.name])
            for field in dataclasses.fields(config_class) if field.type in (int, float, str)]


def arguments(argv):
    """The command line -> (architecture, TrainConfig, model options that were given, resume)."""
    names = ("vqvae", "chameleon", "transfusion", "mot")
    arch = argv[0] if argv and argv[0] in names else None
    early = Parser(prog="train.py", add_help=False, allow_abbrev=False)     # decides the options
    early.add_argument("--setting", default="transfusion")
    setting = early.parse_known_args(argv)[0].setting
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=names, help="what to train")
    groups = {"training": TrainConfig}
    if arch:
        groups["model"] = VQVAEConfig if arch == "vqvae" else MODELS.get(
            (arch, setting if arch == "mot" else arch), (0, TransfusionConfig))[1]
    for title, config_class in groups.items():
        group = parser.add_argument_group(f"{title} options")
        for name, kind, default, text in options_of(config_class):
            shown = f" [{default}]" if default not in ("", 0, 0.0) else ""
            group.add_argument("--" + name.replace("_", "-"), type=kind,
                               metavar=kind.__name__.upper(),
                               help=text.replace("%", "%%") + shown)
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    config = TrainConfig(**{field.name: given[field.name]
                            for field in dataclasses.fields(TrainConfig) if field.name in given})
    model = {name: value for name, value in given.items()
             if name not in ("arch", "resume") and name not in TrainConfig.__dataclass_fields__}
    check(config, given)
    return given["arch"], config, model, given["resume"]


def check(config, given):
    if given["resume"] and given["arch"] == "vqvae":
        raise InputError("--resume is not for vqvae, which trains in a minute: run it again")
    for name, value in given.items():
        least = 0 if name in ("seed", "warmup") or isinstance(value, float) else 1
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    for name, options in (("setting", ("transfusion", "chameleon")), ("size", tuple(SIZES)),
                          ("device", ("auto", "cpu", "cuda", "mps")), ("bottleneck", ("vq", "kl"))):
        value = given.get(name, getattr(config, name, options[0]))
        if value not in options:
            raise InputError(f"--{name} is one of {', '.join(options)}, not {value}")
    if config.picture_size < 8 or config.picture_size % 8:
        raise InputError(f"--picture-size is {config.picture_size}; it must be a multiple of 8")
    if config.picture_size // 4 % given.get("patch", 1):
        raise InputError(f"--patch is {given['patch']}; it must divide the latents' side of "
                         f"{config.picture_size // 4}")


def main():
    arch, config, model_options, resume = arguments(sys.argv[1:])
    if arch == "vqvae":
        train_vqvae(config, model_options)
    else:
        train_transformer(arch, config, model_options, resume)


if __name__ == "__main__":
    run(main)
