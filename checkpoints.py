"""The folder of a run: what is written there, and read back.

A checkpoint holds tensors and plain values alone, so it loads with `weights_only=True`: no code in
a file that a stranger sent is ever run.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import platform
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from data import InputError, Tokenizer
from machine import fast_bf16
from system import MODELS, System, build, layout_of
from vqvae import VQVAE, Codec, VQVAEConfig

FORMAT = 5                  # of checkpoints; raised when what they hold changes

# --- what a run writes ---------------------------------------------------------------------------

@contextlib.contextmanager
def writing(folder):
    """Within it a run's folder is written to; InputError where it cannot be."""
    try:
        yield
    except OSError as error:
        raise InputError(f'--out: "{folder}" cannot be written ({error.strerror}); '
                         "give another --out") from None


def make_folder(folder):
    """Make a run's folder, empty of metrics; InputError where it cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pt").is_file():        # or --resume might go on from it
            os.replace(folder / "checkpoint.pt", folder / "previous.pt")
        (folder / "metrics.jsonl").write_text("", encoding="utf-8")


def check_folder(folder, arch, setting, resume=False):
    """InputError where a run's folder could not be written, or holds a run of another kind: said
    before the work, not after. With `resume` -> the checkpoint that it must hold."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    with writing(folder):
        tempfile.TemporaryDirectory(dir=there).cleanup()
    if not (folder / "checkpoint.pt").is_file():
        ours = ("metrics.jsonl", "benchmark.json", "previous.pt")
        if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists()
                                                                 for name in ours):
            raise InputError(f'--out: "{folder}" holds other files than those of a run; '
                             "give a folder of its own")
        if not resume:
            return None
    kept = load_checkpoint(folder)
    if (kept["arch"], kept["setting"]) != (arch, setting):
        raise InputError(f'--out: "{folder}" holds a run of {kept["arch"]} ({kept["setting"]}), '
                         "which this one would overwrite; give another --out, or remove it")
    return kept if resume else None


def save_checkpoint(path, contents):
    """Written beside and renamed, so that a run that dies while saving leaves the old one whole."""
    new = path.with_suffix(f".{os.getpid()}.new")       # two runs may make one autoencoder at once
    try:
        with open(new, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())         # on the disk, before the old one goes
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        new.unlink(missing_ok=True)
        raise InputError(f'"{path}" cannot be written ({error}); the checkpoint before it, if '
                         "there is one, is kept: go on from it with --resume") from None


def packed(autoencoder):
    return {"config": dataclasses.asdict(autoencoder.config), "weights": autoencoder.state_dict()}


def write_json(path, contents):
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def made_with(device):
    """What a checkpoint says of where it was made; a run goes on in the same precision."""
    return {"format": FORMAT, "bf16": {device.type: fast_bf16(device)},
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "numpy": np.__version__}}


# --- what is read back ---------------------------------------------------------------------------

ANOTHER = "give another, or train one anew in a folder of its own"


def load_checkpoint(path):
    """A run's folder or its checkpoint.pt -> its contents, checked; InputError where it is none."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f'there is no checkpoint "{path}"; train one with: python train.py mot')
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):        # as torch.save writes them
            raise InputError(f'"{path}" is not a checkpoint, or cut short; {ANOTHER}')
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f'"{path}" holds more than tensors and plain values, code perhaps: '
                         "refused, and nothing in it was run") from None
    except Exception as error:      # whatever torch and zip make of a broken or foreign file
        raise InputError(f'"{path}" cannot be loaded as a checkpoint '
                         f"({type(error).__name__}): it is broken, or of something else; "
                         + ANOTHER) from None
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise InputError(f'"{path}" is not a checkpoint of this project; {ANOTHER}')
    if saved["format"] != FORMAT:
        newer = saved["format"] > FORMAT
        raise InputError(f'"{path}" has format {saved["format"]}, this code reads {FORMAT}: '
                         + ("update the code" if newer else "train it again, with another --out"))
    wanted = ["arch", "setting", "autoencoder"]
    if saved.get("arch") != "vqvae":
        wanted = ["arch", "autoencoders", "codecs", "setting", "config", "mot", "merges", "ema",
                  "train", "model", "optimizers", "step", "seconds", "stream", "digest", "bf16",
                  "longest_text"]
    missing = [name for name in wanted if name not in saved]
    if missing:
        raise InputError(f'"{path}" lacks {", ".join(missing)}: not a whole checkpoint; {ANOTHER}')
    if saved["arch"] != "vqvae" and (str(saved["arch"]), str(saved["setting"])) not in MODELS:
        raise InputError(f'"{path}" is of an architecture that this code does not know: '
                         f'{saved["arch"]} ({saved["setting"]}); {ANOTHER}')
    return saved


@contextlib.contextmanager
def trusted(path):
    """Within it a checkpoint's contents are used; InputError where they are not what they were."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise InputError(f'"{path}" holds a model that this code cannot build: it was written by '
                         f"another version, or changed since; {ANOTHER}") from None


def load_autoencoder(saved):
    """{"config", "weights"} -> VQVAE."""
    config = {name: _tuples(value) for name, value in saved["config"].items()}
    autoencoder = VQVAE(VQVAEConfig(**config))
    autoencoder.load_state_dict(saved["weights"])
    return autoencoder.eval()


def _tuples(value):
    return tuple(_tuples(part) for part in value) if isinstance(value, (list, tuple)) else value


def load_system(path, device="cpu"):
    """A trained model, ready to talk."""
    saved = load_checkpoint(path)
    if saved["arch"] == "vqvae":
        raise InputError(f'"{path}" is an autoencoder; '
                         "sample.py talks to chameleon, transfusion and mot")
    with trusted(path):
        tokenizer = Tokenizer(saved["merges"])
        autoencoders = {name: load_autoencoder(kept).to(device)
                        for name, kept in saved["autoencoders"].items()}
        codecs = {name: Codec(name, autoencoders[name], frames)
                  for name, frames in saved["codecs"].items()}
        model = build(saved["arch"], saved["setting"], saved["config"],
                      layout_of(tokenizer, codecs), saved["mot"])
        model.load_state_dict(saved["ema"])
        return System(model.to(device), codecs, tokenizer, device, saved["longest_text"])
