"""Train any of the four systems: one command line.

    python train.py mot                 captions become pictures, pictures become captions
    python train.py transfusion         the same, all weights shared
    python train.py chameleon           the same, everything a discrete token
    python train.py vqvae               the tokenizer alone
    python train.py mot --data all      words, pictures, sounds and clips in one model
    python train.py mot --data FOLDER   your own files (FOLDER/metadata.jsonl has the captions)

Writes to runs/NAME: checkpoint.pt, metrics.jsonl, report.json, curves.png, samples.png, progress/
and transcript.md. Autoencoders are trained on first use, kept under a name that holds their data
and settings, and reused.
"""

import os

# a thread that waits for another spins only briefly, so that other programs do not stall the run
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# torch.compile takes the processor's word for what it can do; to try each way takes 10 seconds
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import argparse  # noqa: I001 (long imports are wrapped, not one name a line)
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import benchmark
import scores
import show
from autoencoders import autoencoder_config, frames_of, parts_of, train_autoencoder
from checkpoints import (check_folder, load_autoencoder, made_with, make_folder, packed,
                         save_checkpoint, trusted, write_json, writing)
from corpora import EXAMPLES, folder_corpus, toy_corpus
from data import MODALITIES, Alternate, Batches, InputError, Tokenizer, plan_rows
from machine import (FAST_BF16, from_first, join_processes, leave_processes, pick_device, rank,
                     world)
from sample import Parser, run, write_document
from system import MODELS, Codecs, System, build, layout_of
from trainer import PAYS, Trainer, facts
from transfusion import TransfusionConfig
from vqvae import VQVAE, Codec, VQVAEConfig
from worlds import motion, stories


@dataclass(frozen=True)
class TrainConfig:
    data: str = "shapes"            # shapes, tones, motion, stories, all; or a folder of your files
    setting: str = "transfusion"    # the host of mot: transfusion or chameleon
    out: str = ""                   # the run's folder (default: runs/ and the run's name)
    steps: int = 0                  # training steps (on other data than shapes: see PRESETS)
    batch_size: int = 0             # packed rows a step; of vqvae, pictures (other data: PRESETS)
    accumulate: int = 1             # parts that a batch is computed in, for want of memory
    context: int = 0                # positions of a row (default: the shortest that pack well)
    picture_size: int = 0           # pixels of a side; a multiple of 8 (default: 32, base: 64)
    size: str = "tiny"              # of the model: tiny, small, or base (for a GPU)
    examples: int = 0               # of a toy world, to train on (default: EXAMPLES in corpora.py)
    towers: str = "0,1,2,3"         # mot's, of text, image, audio, video; equal ones share weights
    seed: int = 0                   # of everything random
    device: str = "auto"            # auto, cpu, cuda or mps
    lr: float = 0.0                 # peak learning rate
    optimizer: str = ""             # adamw, or muon for the matrices of inner layers (muon.py)
    warmup: int = 100               # steps until the peak; then a cosine down to a hundredth of it
    weight_decay: float = None      # lr times this comes off each weight a step
    read_share: float = None        # share of pairs that are read: the signal first, then its words
    caption_dropout: float = None   # share of pairs that go without words: guidance's null branch
    ema: float = 0.998              # decay of the averaged weights that scores and samples use
    autoencoder_steps: int = 0      # of the autoencoder trained on first use (default: vqvae's)
    save_every: int = 1000          # steps from save to save, or a minute if that is less
    fsdp: bool = False              # every process keeps a share of each weight (fully_shard)
    cases: int = 512                # held-out cases for each score


# what differs by architecture and data; and the presets of --size
PRESETS = {"vqvae-kl": {"steps": 1200, "batch_size": 32, "lr": 3e-3, "optimizer": "adamw"},
           "vqvae-vq": {"steps": 1200, "batch_size": 32, "lr": 3e-3, "optimizer": "muon"},
           "vqvae-vq audio": {"steps": 1000},
           "vqvae-vq video": {"steps": 2400},
           "vqvae-kl video": {"steps": 2400},
           "transfusion": {"steps": 3600, "batch_size": 20, "lr": 2.5e-3, "weight_decay": 0.01,
                           "optimizer": "adamw", "read_share": 0.4, "caption_dropout": 0.1},
           "chameleon": {"steps": 2700, "batch_size": 16, "lr": 3e-3, "weight_decay": 0.4,
                         "optimizer": "adamw", "read_share": 0.4, "caption_dropout": 0.1},
           "transfusion tones": {"steps": 3000, "batch_size": 30},
           "transfusion motion": {"steps": 3000, "batch_size": 20},
           "transfusion stories": {"steps": 3000, "batch_size": 30},
           "transfusion all": {"steps": 6500, "batch_size": 20, "lr": 3e-3, "weight_decay": 0.1},
           "chameleon tones": {"steps": 3000, "batch_size": 24, "lr": 4e-3, "weight_decay": 0.3},
           "chameleon motion": {"steps": 3000, "batch_size": 8, "lr": 4e-3, "weight_decay": 0.3},
           "chameleon stories": {"steps": 3000, "batch_size": 30, "lr": 4e-3, "weight_decay": 0.3},
           "chameleon all": {"steps": 7300, "batch_size": 14, "lr": 4e-3, "weight_decay": 0.1,
                             "optimizer": "muon", "read_share": 0.45, "caption_dropout": 0.0},
           "small": {"lr": 2e-3},
           "base": {"lr": 4e-4, "batch_size": 64, "steps": 20_000, "weight_decay": 0.1}}
SIZES = {"tiny": {}, "small": {"width": 256, "depth": 8, "heads": 8, "hidden": 704},
         "base": {"width": 768, "depth": 14, "heads": 12, "hidden": 2048}}
# the same, of a model's own options
MODEL_PRESETS = {"chameleon all": {"reading_weight": 25.0, "text_only_weight": 4.0,
                                   "code_noise": 0.95}}

# training options that may differ when a run goes on; what else is given must be as it was
MAY_CHANGE = ("steps", "lr", "accumulate", "save_every", "cases", "device", "out", "fsdp", "resume",
              "benchmark", "arch")

# training options that mean nothing to an architecture
WITHOUT_EFFECT = {"vqvae": ("setting", "towers", "context", "size", "warmup", "weight_decay", "ema",
                            "accumulate", "autoencoder_steps", "channels", "read_share",
                            "caption_dropout"),
                  "chameleon": ("setting", "towers"), "transfusion": ("setting", "towers")}


# --- the runs ------------------------------------------------------------------------------------

def name_of(data):
    """--data -> what its runs are called."""
    if data in EXAMPLES:
        return data
    name = re.sub(r"\W+", "-", Path(os.path.realpath(data)).name)
    return f"{name}-folder" if name in EXAMPLES else name


def load_data(config):
    """--data -> (training Corpus, held-out Corpus or None: toy worlds draw theirs fresh)."""
    if config.data in EXAMPLES:
        rng = np.random.default_rng(config.seed)
        return toy_corpus(config.data, rng, config.examples, config.picture_size), None
    return folder_corpus(config.data, config.picture_size)


def digest_of(corpus):
    """What tells whether data is the same."""
    digest = hashlib.sha256(repr(corpus.documents).encode())
    for stored in corpus.signals.values():
        digest.update(stored.tobytes())
    return digest.hexdigest()[:16]


def train_vqvae(config, model_options, resume=False):
    """python train.py vqvae: an autoencoder for each modality that the data has."""
    device, bottleneck = pick_device(config.device), model_options.get("bottleneck", "vq")
    if config.data == "stories":
        raise InputError("--data stories: words alone need no autoencoder")
    name, (corpus, held_out) = name_of(config.data), load_data(config)
    kinds = sorted(corpus.signals)
    outs = {kind: config.out and (config.out if len(kinds) == 1 else f"{config.out}/{kind}")
            for kind in kinds}
    for out in filter(None, outs.values()):
        from_first(lambda out=out: check_folder(Path(out), "vqvae", bottleneck))
    for kind, out in outs.items():
        model_config = autoencoder_config(kind, config, **{"bottleneck": "vq", **model_options})
        _, folder = train_autoencoder(kind, corpus, held_out, model_config,
                                      with_presets(config, f"vqvae-{bottleneck}",
                                                   f"vqvae-{bottleneck} {kind}"), device, name, out,
                                      resume and kind == kinds[0])   # others may not be begun
        if rank() == 0:
            finish(folder)


def with_presets(config, *names):
    """The config with what was not given filled in from PRESETS; a later name goes first."""
    presets = {}
    for name in names:
        presets |= PRESETS.get(name, {})
    return dataclasses.replace(config, **{
        option: value for option, value in presets.items()
        if getattr(config, option) == getattr(TrainConfig, option)})


def as_before(saved, config, options, given, folder):
    """The options of a run that goes on: those that it began with, but for what MAY_CHANGE and is
    given; InputError where anything else is given otherwise -> (TrainConfig, model options)."""
    before = {**saved["train"], **saved["config"]}
    for name, value in {**given, **options}.items():
        same = value == before.get(name, value) or (
            name == "data" and name_of(value) == name_of(before[name]))
        if not same and name not in MAY_CHANGE:
            raise InputError(f'--resume: "{folder}" was trained with --{name.replace("_", "-")} '
                             f"{before[name]}, not {value}; give the same, or another --out")
    kept = {name: before[name] for name in saved["train"]
            if name not in ("data", "device", "out", "fsdp")}
    now = {name: value for name, value in given.items() if name in kept and name in MAY_CHANGE}
    FAST_BF16.update(saved["bf16"])
    return dataclasses.replace(config, **{**kept, **now}), saved["config"]


def train_transformer(arch, config, model_options, given):
    """python train.py chameleon, transfusion or mot"""
    begun, setting = time.time(), config.setting if arch == "mot" else arch
    device, name = pick_device(config.device), name_of(config.data)
    folder = folder_of(arch, setting, config, name)
    saved = from_first(lambda: check_folder(folder, arch, setting, given["resume"]))
    if saved:
        with trusted(folder):
            config, model_options = as_before(saved, config, model_options, given, folder)
    config = with_presets(config, setting, f"{setting} {name}", config.size)
    corpus, held_out = load_data(config)
    digest = digest_of(corpus)
    if saved and saved["digest"] != digest:
        raise InputError(f'--resume: "{folder}" was trained on other data than "{config.data}" '
                         "holds now; give the same data, or another --out")
    model, batches, codecs, about = prepare(arch, setting, config, model_options, corpus, held_out,
                                            name, device, saved)
    about["digest"], tokenizer = digest, Tokenizer(about["merges"])
    told = share_of_stories(batches, tokenizer) if held_out is None else 0.0
    trainer = Trainer(model, batches, config, device, folder, sharded=config.fsdp)
    if saved:
        with trusted(folder):
            trainer.resume(saved)
    else:
        from_first(lambda: make_folder(folder))
    trainer.compile()
    system = System(trainer.averaged, codecs, tokenizer, device, about["longest_text"])

    def progress():
        show.sheet(system, folder / "progress" / f"step-{trainer.step:06d}.png",
                   f"{arch}, step {trainer.step}", held_out, told > 0, count=4)

    def save():
        contents = {**about, **trainer.state(everywhere=False)}
        if rank() == 0:
            save_checkpoint(folder / "checkpoint.pt", contents)

    called = f"{arch} ({setting})" if arch == "mot" else arch
    trainer.train(called, save, max(1, config.steps // 4), progress)
    if trainer.samples:
        report = {"arch": arch, "setting": setting, "data": name, **facts(trainer)}
        report |= (scores.score_toys(system, config.cases, stories_share=told)
                   if held_out is None else scores.score_folder(system, held_out, config.cases))
        report["wall_seconds"] = round(time.time() - begun, 1)
        title = f"{called}, {name}, {trainer.step} steps, seed {config.seed}"
        write_run(system, folder, report, title, held_out, told > 0)


def folder_of(arch, setting, config, name):
    """The folder of a run on data of this name."""
    return Path(config.out or "runs/" + "-".join(
        [arch] + ["chameleon"] * (arch == "mot" and setting == "chameleon")
        + [name] * (name != "shapes")))


def prepare(arch, setting, config, model_options, corpus, held_out, name, device, saved=None,
            trained=True):
    """Tokenize everything once -> (model, batches, codecs, what a checkpoint says of them).

    saved: a checkpoint to go on from, whose autoencoders are used. trained=False leaves them as
    they were made: to measure speed.
    """
    _, config_class, bottleneck = MODELS[arch, setting]
    model_config = config_class(**{**MODEL_PRESETS.get(f"{setting} {name}", {}),
                                   **SIZES[config.size], **model_options})
    if model_config.width % (2 * model_config.heads):
        raise InputError(f"--width {model_config.width} does not split into {model_config.heads} "
                         "heads of even width; change --width or --heads")
    mot = {"towers": towers_of(config)} if arch == "mot" else None
    untrained = {kind: VQVAE(autoencoder_config(kind, config, bottleneck=bottleneck))
                 for kind in corpus.signals}
    tokenizer = Tokenizer.train(corpus.texts())

    def codecs_by(autoencoders):
        return {name: Codec(name, autoencoders[name], frames_of(name, corpus))
                for name in corpus.signals}
    codecs, patch = codecs_by(untrained), getattr(model_config, "patch", 1)
    layout = layout_of(tokenizer, codecs)
    for modality, codec in codecs.items():
        grid = codec.autoencoder.config.grid
        if any(side % patch for side in grid):
            raise InputError(f"--patch is {patch}; it must divide the latents of {modality}, "
                             f"{grid[0]} x {grid[1]}")
    torch.manual_seed(config.seed)
    model = build(arch, setting, dataclasses.asdict(model_config), layout, mot)
    plans = plan_rows(corpus, tokenizer, model.span_lengths, parts_of(config), config.context)
    encoded = {}        # filled below: that batches can be is seen before anything is trained
    streams = [Batches(rows.corpus, tokenizer, layout, encoded, model.span_lengths, rows.count,
                       rows.length, config.seed, config.read_share, config.caption_dropout)
               for rows in plans]
    parts = config.accumulate * world()
    batches = Alternate(streams, parts) if len(streams) > 1 else streams[0]
    if saved:
        with trusted("checkpoint.pt"):
            autoencoders = {kind: load_autoencoder(saved["autoencoders"][kind]).to(device)
                            for kind in untrained}
    elif trained:
        autoencoders = trained_like(untrained, corpus, held_out, config, name, device)
    else:
        autoencoders = {kind: model.eval().to(device) for kind, model in untrained.items()}
    codecs = codecs_by(autoencoders)
    for modality in codecs:
        encoded[modality] = Codecs(codecs, device).encode(modality, corpus.signals[modality])
        if setting == "chameleon" and not saved:
            codebook = autoencoders[modality].bottleneck.codebook.cpu()
            model.start_codes(MODALITIES.index(modality), codebook)
    about = {**made_with(device), "arch": arch, "setting": setting, "data": name, "mot": mot,
             "config": dataclasses.asdict(model_config), "train": dataclasses.asdict(config),
             "merges": [list(pair) for pair in tokenizer.merges],
             "autoencoders": {kind: packed(model) for kind, model in autoencoders.items()},
             "codecs": {name: codec.frames for name, codec in codecs.items()},
             "longest_text": max(len(tokenizer.encode(text)) for text in corpus.texts())}
    return model, batches, codecs, about


def trained_like(untrained, corpus, held_out, config, name, device):
    """{kind: VQVAE} -> the same, trained on a corpus: on first use, then kept."""
    config = dataclasses.replace(config, steps=config.autoencoder_steps, batch_size=0, lr=0.0,
                                 accumulate=1, optimizer="")
    trained = {}
    for kind, model in untrained.items():
        preset = f"vqvae-{model.config.bottleneck}"
        options = with_presets(config, preset, f"{preset} {kind}")
        each = -(-options.batch_size // world())            # pictures of a process, rounded up
        options = dataclasses.replace(options, batch_size=each * world())
        trained[kind], _ = train_autoencoder(kind, corpus, held_out, model.config, options, device,
                                             name)
    return trained


def measure_speed(arch, config, model_options):
    """python train.py ARCH --benchmark: MoT beside its dense host."""
    setting, device = config.setting if arch == "mot" else arch, pick_device(config.device)
    config = dataclasses.replace(config, examples=config.examples or 4000)
    name, (corpus, _) = name_of(config.data), load_data(config)
    if "image" not in corpus.signals:
        raise InputError(f"--benchmark draws pictures, and {name} has none")
    folder = folder_of(arch, setting, config, name)
    from_first(lambda: check_folder(folder, arch, setting))
    config = with_presets(config, setting, f"{setting} {name}", config.size)
    config = dataclasses.replace(config, steps=max(config.steps, PAYS))     # so: compiled
    model, batches, codecs, about = prepare(arch, setting, config, model_options, corpus, None,
                                            name, device, trained=False)
    if isinstance(batches, Alternate):          # long rows and short ones: those that come oftener
        batches = max(batches.kinds, key=lambda kind: kind[1])[0]
    dense = build(setting, setting, about["config"], model.layout)
    mot = build("mot", setting, about["config"], model.layout, {"towers": towers_of(config)})
    trainers = {name: Trainer(model, batches, config, device, folder)
                for name, model in ((setting, dense), ("mot", mot))}
    tokenizer = Tokenizer(about["merges"])
    systems = {name: System(trainer.averaged, codecs, tokenizer, device)
               for name, trainer in trainers.items()}
    found = benchmark.report(trainers, batches, systems, device, config.picture_size)
    if rank() > 0:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "benchmark.json", found)


def towers_of(config):
    """--towers: by modality, the number of its tower."""
    towers = config.towers.split(",")
    if len(towers) != len(MODALITIES) or not all(tower in ("0", "1", "2", "3") for tower in towers):
        raise InputError(f"--towers is {config.towers}; it must be four numbers 0 to 3, those of "
                         f"{', '.join(MODALITIES)}: 0,1,2,1 lets image and video share one")
    return [int(tower) for tower in towers]


def share_of_stories(batches, tokenizer, count=300):
    """The share of the documents of so many batches that stories.py tells."""
    state, told, total = copy.deepcopy(batches.state), 0, 0
    for _ in range(count):
        for document in itertools.chain(*batches.fill()):
            alone = len(document) == 1 and document[0][0] == 0
            told += alone and stories.grade(tokenizer.decode(document[0][1])) is not None
            total += 1
    batches.state = state           # those were not drawn
    return told / total


def write_run(system, folder, report, title, held_out, told):
    """What a finished run leaves beside its checkpoint, and a word about it."""
    if rank() == 0:
        write_json(folder / "report.json", report)
        show.curves(folder / "metrics.jsonl", folder / "curves.png", title)
    show.sheet(system, folder / "samples.png", title, held_out, told)
    torch.manual_seed(report["seed"])
    free = system.complete([[]], spans=3, temperature=1.0)[0]
    if rank() == 0:
        write_document(free, folder / "transcript.md")
        finish(folder)


def finish(folder):
    """Print the scores, and where to look."""
    report = json.loads((folder / "report.json").read_text())
    for name, value in report.items():
        if f"{name}_n" in report:
            print(f"{name:<28}{value:8.3f}   ({report[f'{name}_n']} cases)")
        elif name in ("perplexity", "codes_used", "wall_seconds", "peak_memory_mib",
                      "text_entropy", "text_excess"):
            print(f"{name:<28}{value:8.3f}")
    print(f"see {folder}/: " + ", ".join(sorted(path.name for path in folder.iterdir())))


# --- command line --------------------------------------------------------------------------------

def options_of(config_class):
    """(name, type, default, help) of a config's plain fields; help is the field's comment."""
    comments = dict(re.findall(r"^    (\w+): .*?# (.+)$", inspect.getsource(config_class), re.M))
    return [(field.name, field.type, field.default, comments[field.name])
            for field in dataclasses.fields(config_class) if field.type in (int, float, str)]


def arguments(argv):
    """The command line -> (TrainConfig, model options that were given, all that was given)."""
    names = ("vqvae", "chameleon", "transfusion", "mot")
    arch = argv[0] if argv and argv[0] in names else None
    if not arch and set(argv) & set(names):
        raise InputError("the architecture comes first, then its options: python train.py mot ...")
    # what decides the other options and their defaults
    early = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    for name, default in (("setting", "transfusion"), ("bottleneck", "vq"), ("data", "shapes"),
                          ("size", "tiny")):
        early.add_argument(f"--{name}", default=default)
    known = early.parse_known_args(argv)[0]
    setting, presets = known.setting, {}
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=names, help="what to train")
    groups, preset = {"training": TrainConfig}, setting if arch == "mot" else arch
    preset = f"vqvae-{known.bottleneck}" if arch == "vqvae" else preset
    for name in (preset, f"{preset} {known.data}", *[known.size] * (arch != "vqvae")):
        presets |= PRESETS.get(name, {}) | SIZES.get(name, {}) | MODEL_PRESETS.get(name, {})
    if arch:
        groups["model"] = VQVAEConfig if arch == "vqvae" else MODELS.get(
            (arch, setting if arch == "mot" else arch), (0, TransfusionConfig))[1]
    for title, config_class in groups.items():
        group = parser.add_argument_group(f"{title} options")
        for name, kind, default, text in options_of(config_class):
            if name in WITHOUT_EFFECT.get(arch, ()):
                continue
            default = presets.get(name, default)
            shown = f" [{default}]" if default else ""
            group.add_argument("--" + name.replace("_", "-"), type=kind,
                               metavar=kind.__name__.upper(),
                               help=text.replace("%", "%%") + shown)
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--benchmark", action="store_true",
                        help="train nothing: measure how fast steps and sampling are")
    if arch != "vqvae":
        parser.add_argument("--fsdp", action="store_true", default=None,
                            help="under torchrun: each process keeps a share of every weight")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    config = TrainConfig(**{field.name: given[field.name]
                            for field in dataclasses.fields(TrainConfig) if field.name in given})
    model = {name: value for name, value in given.items()
             if name not in ("arch", "resume", "benchmark")
             and name not in TrainConfig.__dataclass_fields__}
    if "picture_size" not in given:
        large = config.size == "base" and not has_one_size(config.data)
        config = dataclasses.replace(config, picture_size=64 if large else motion.PIXELS)
    check(config, given)
    return config, model, given


def has_one_size(data):
    """Whether the pictures of this data are always 32 pixels high, like the frames of clips."""
    return data in EXAMPLES and data != "shapes"


def check(config, given):
    if config.fsdp and "RANK" not in os.environ:
        raise InputError("--fsdp shares weights among processes; start them with: "
                         "torchrun --nproc-per-node 2 train.py ...")
    if given["benchmark"] and (given["arch"] == "vqvae" or given["resume"] or config.fsdp
                               or config.accumulate > 1):
        raise InputError("--benchmark is for chameleon, transfusion and mot, and without --resume, "
                         "--accumulate and --fsdp")
    for name, value in given.items():
        least = 0 if name in ("seed", "warmup") or isinstance(value, float) else 1
        if name == "time_mean" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not value >= least:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    if config.seed >= 2 ** 63:
        raise InputError(f"--seed is {config.seed}; it must be below 2^63")
    if scores.SEED <= config.seed < scores.SEED + 1000:
        raise InputError(f"--seed is {config.seed}; {scores.SEED} to {scores.SEED + 999} are those "
                         "of the cases that scores are measured on: give another")
    if given.get("lr") == 0:
        raise InputError("--lr is 0: nothing would be learned")
    for name, options in (("setting", ("transfusion", "chameleon")), ("size", tuple(SIZES)),
                          ("device", ("auto", "cpu", "cuda", "mps")), ("bottleneck", ("vq", "kl")),
                          ("optimizer", ("adamw", "muon"))):
        value = given.get(name, getattr(config, name, "") or options[0])
        if value not in options:
            raise InputError(f"--{name} is one of {', '.join(options)}, not {value}")
    if config.picture_size < 8 or config.picture_size % 8:
        raise InputError(f"--picture-size is {config.picture_size}; it must be a multiple of 8")
    if has_one_size(config.data) and config.picture_size != motion.PIXELS:
        raise InputError(f"--picture-size: the pictures of {config.data} have {motion.PIXELS} "
                         "pixels a side")


def main():
    config, model_options, given = arguments(sys.argv[1:])
    join_processes()
    try:
        if given["benchmark"]:
            measure_speed(given["arch"], config, model_options)
        elif given["arch"] == "vqvae":
            train_vqvae(config, model_options, given["resume"])
        else:
            train_transformer(given["arch"], config, model_options, given)
    finally:
        leave_processes()


if __name__ == "__main__":
    run(main)
