"""The autoencoders behind the models: trained on first use, kept, and reused.

Each modality has its own: of pictures, of the spectra of sounds, of the frames of clips. Each is
kept in runs/ under a name that holds its data and settings, so that one that was trained on other
data or with other settings is never used silently.
"""

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch

import scores
import show
from checkpoints import (
    FORMAT,
    load_autoencoder,
    load_checkpoint,
    made_with,
    make_folder,
    packed,
    save_checkpoint,
    trusted,
    write_json,
)
from data import InputError, to_signal
from machine import FAST_BF16, from_first, precision, rank, say, world
from system import Codecs
from trainer import Signals, Trainer, facts
from vqvae import BINS, HOP, VQVAE, Codec, VQVAEConfig, code_usage, spectrum
from worlds import tones


def autoencoder_config(kind, config, **options):
    """The autoencoder of a modality: what differs are channels, size and how far it goes down."""
    shape = {"size": (config.picture_size, config.picture_size)}
    if kind == "audio":
        shape = {"channels": 1, "size": (BINS, tones.LENGTH // HOP), "strides": ((4, 2), (4, 2))}
    if kind == "video":     # a frame in 4 x 4, not 8 x 8: it shows one thing, and a clip has eight
        shape |= {"strides": ((2, 2),) * 3, "widths": (32, 64, 128), "latent_channels": 8}
    return VQVAEConfig(**{**shape, **options})


def signals_of(kind, corpus):
    """What an autoencoder learns from, as stored: pictures, sounds, single frames of clips."""
    stored = corpus.signals.get(kind, ())
    return stored.reshape(-1, *stored.shape[2:]) if kind == "video" and len(stored) else stored


def train_autoencoder(kind, corpus, held_out, model_config, config, device, data_name, folder=None,
                      resume=False):
    """Train an autoencoder on a corpus's signals, go on with one that was not finished, or load one
    that was -> (VQVAE, its folder). With `resume` there must be one."""
    stored = signals_of(kind, corpus)
    as_picture = spectrum if kind == "audio" else torch.as_tensor       # the others are pictures
    key = {"format": FORMAT, "data": hashlib.sha256(np.ascontiguousarray(stored)).hexdigest(),
           "model": dataclasses.asdict(model_config), "steps": config.steps,
           "batch_size": config.batch_size, "lr": config.lr, "optimizer": config.optimizer,
           "seed": config.seed}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    sort = f"{model_config.bottleneck}-{data_name}" + f"-{kind}" * (kind != "image")
    folder = Path(folder or f"runs/vqvae-{sort}-{digest}")
    path = folder / "checkpoint.pt"
    kept = from_first(lambda: load_checkpoint(path) if path.is_file() else {})
    if kept.get("key") != key:
        if resume:
            raise InputError(f'--resume: "{folder}" holds no run with this data and these options')
        kept = {}
    if kept and "stream" not in kept:
        say(f"autoencoder: {folder} (trained before)")
        with trusted(path):
            return load_autoencoder(kept["autoencoder"]).to(device), folder
    begun, config = time.time(), dataclasses.replace(config, ema=0.0, weight_decay=0.01, warmup=50)
    torch.manual_seed(config.seed)
    batches = Signals(stored, parts_of(config), config.seed, as_picture)
    trainer = Trainer(VQVAE(model_config), batches, config, device, folder, compiled=False)
    if kept:
        with trusted(path):
            FAST_BF16.update(kept["bf16"])
            trainer.resume(kept)
        say(f"autoencoder: {folder} goes on from step {trainer.step}")
    else:
        from_first(lambda: make_folder(folder))
    seen = signals_of(kind, held_out) if held_out else ()
    some = seen if len(seen) else stored
    shown = as_picture(to_signal(some[::max(1, len(some) // 12)][:12])).to(device)
    about = {"arch": "vqvae", "setting": model_config.bottleneck, "key": key}
    train_and_save(trainer, shown, kind, about)
    with torch.no_grad(), precision(device):
        trainer.model.fit_scale(as_picture(to_signal(stored[:4000])).to(device))
    if rank() == 0:
        report = {"arch": "vqvae", "setting": model_config.bottleneck, "data": data_name,
                  "reads": kind, **facts(trainer), "wall_seconds": round(time.time() - begun, 1),
                  **autoencoder_scores(kind, trainer.model, corpus, held_out, config, device)}
        write_results(trainer, shown, report, about)
    return trainer.model, folder


def train_and_save(trainer, shown, kind, about):
    """Train to the last step; what is saved says that the autoencoder is not yet finished."""
    folder, model = trainer.out, trainer.model

    def save():
        state = {**trainer.state(everywhere=False), **about, **made_with(trainer.device)}
        if rank() == 0:
            save_checkpoint(folder / "checkpoint.pt", {"autoencoder": packed(model), **state})

    def progress():
        look(trainer, shown, folder / "progress" / f"step-{trainer.step:06d}.png",
             f"{folder.name}: reconstructions, step {trainer.step}")
    trainer.train(f"autoencoder ({kind}, {model.config.bottleneck})", save,
                  max(1, trainer.config.steps // 4), progress, how="the same command again")


def write_results(trainer, shown, report, about):
    """What a finished autoencoder leaves; its checkpoint, the last, has no trainer's state."""
    folder = trainer.out
    write_json(folder / "report.json", report)
    show.curves(folder / "metrics.jsonl", folder / "curves.png", f"{folder.name}: training losses")
    look(trainer, shown, folder / "samples.png", f"{folder.name}: reconstructions")
    save_checkpoint(folder / "checkpoint.pt", {"autoencoder": packed(trainer.model), **about,
                                               **made_with(trainer.device)})


def look(trainer, shown, path, title):
    """A picture of some signals above their reconstructions."""
    model, training = trainer.model, trainer.model.training
    model.eval()
    with torch.no_grad(), precision(trainer.device):
        rebuilt = model(shown)
    model.train(training)
    show.reconstructions(shown.cpu(), rebuilt.cpu(), path, title)


def parts_of(config):
    """Rows, or pictures, of one part of a batch: each process computes --accumulate of them."""
    parts = config.accumulate * world()
    if config.batch_size % parts:
        raise InputError(f"--batch-size {config.batch_size} does not split into {parts} parts "
                         f"(--accumulate {config.accumulate}, {world()} processes): change it")
    return config.batch_size // parts


def autoencoder_scores(kind, model, corpus, held_out, config, device):
    """How well it rebuilds signals of its modality, and how thousands of them use the codes."""
    frames = frames_of(kind, corpus)
    codecs, report = Codecs({kind: Codec(kind, model, frames)}, device), {}
    if held_out is None:
        report = scores.score_reconstruction(codecs, kind, config.cases)
    elif kind in held_out.signals:
        report = scores.score_psnr(codecs, kind, held_out, config.cases)
    if model.config.bottleneck == "vq":
        codes = codecs.encode(kind, corpus.signals[kind][:8000 // frames])
        report["perplexity"], report["codes_used"] = code_usage(codes, model.config.codes)
    return report


def frames_of(name, corpus):
    """Frames of a clip; 1 of anything else."""
    return corpus.signals[name].shape[1] if name == "video" else 1
