"""train.py and sample.py: what they refuse, in one sentence; what they write; that runs repeat."""

import copy
import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from adapter import PROGRAM, load

autoencoders, checkpoints, system = load("autoencoders"), load("checkpoints"), load("system")
corpora, data, machine, media = load("corpora"), load("data"), load("machine"), load("media")
sample, show, train, trainer = load("sample"), load("show"), load("train"), load("trainer")
mot, vqvae = load("mot"), load("vqvae")
motion, tones = load("worlds.motion"), load("worlds.tones")

SYSTEMS = {"chameleon": ["chameleon"], "transfusion": ["transfusion"], "mot": ["mot"],
           "mot-chameleon": ["mot", "--setting", "chameleon"]}
FEW = ["--autoencoder-steps", "5", "--cases", "4", "--batch-size", "8"]
BRIEF = [*FEW, "--picture-size", "16"]
FILES = {"checkpoint.pt", "metrics.jsonl", "report.json", "curves.png", "samples.png"}
KEYS = {"arch", "setting", "data", "seed", "torch", "device", "parameters", "active_parameters",
        "steps", "tokens", "flops", "wall_seconds", "tokens_per_second"}
SCORES = {"generation_exact", "generation_exact_one", "generation_exact_two",
          "generation_exact_heldout", "caption_exact", "boi_rate", "reconstruction_exact"}
every_system = pytest.mark.parametrize("name", SYSTEMS)

# a model of clips is slow, so it is small, and so are they: 8 frames of 4 codes, of 16 else
PIXELS = 16
SMALL = ["--picture-size", PIXELS, "--depth", 1, "--width", 32, "--heads", 2, "--hidden", 64]
MIXED = ["--data", "mixed", "--steps", 2, "--autoencoder-steps", 2, "--cases", 2,
         "--batch-size", 4, *SMALL]
FILE = {"image": "mixed/0.png", "audio": "mixed/0.wav", "video": "mixed/0.gif"}


def call(main, *argv):
    """Run a command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__ + ".py", *map(str, argv)])
        patch.setattr(trainer, "compiler_exists", lambda device: False)
        sample.run(main)


def write_folder(folder, count=6):
    """Pictures of one colour each, named by it."""
    folder.mkdir()
    lines = []
    for n in range(count):
        Image.new("RGB", (32, 32), (40 * n, 0, 255 - 40 * n)).save(folder / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": f"number {n}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of six pictures, below a working directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return write_folder(tmp_path / "pictures")


def draw_little(patch):
    """Drawing takes long: a run draws its last sheet and curves, its autoencoders nothing."""
    def sparing(draw):
        def maybe(*arguments, **options):
            out = [path for path in arguments if isinstance(path, Path)][-1]
            if out.parent.name != "progress" and not out.parent.name.startswith("vqvae-"):
                draw(*arguments, **options)
        return maybe
    for name in ("sheet", "curves", "reconstructions"):
        patch.setattr(show, name, sparing(getattr(show, name)))


def train_systems():
    """Here, train every system for three steps on six pictures."""
    write_folder(Path("pictures"))
    for name, argv in SYSTEMS.items():
        call(train.main, *argv, "--data", "pictures", "--out", name, "--steps", 3, *BRIEF)
    call(train.main, "vqvae", "--data", "pictures", "--out", "vqvae", "--steps", 3,
         "--batch-size", 4)


def train_mixed():
    """Here, train two systems on pictures, sounds and clips, three each."""
    lines, rng, place = [], np.random.default_rng(0), Path("mixed")
    place.mkdir()
    for name, save in sample.SAVE.items():
        world = corpora.WORLDS[name]
        for n in range(3):
            scene, file = world.sample(rng), f"{n}{sample.SUFFIX[name]}"
            save(world.render(scene, rng), place / file)
            lines.append({"file_name": file, "text": world.describe(scene, rng)})
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for file in ("0.wav", "0.gif"):
        whole = (place / file).read_bytes()
        Path(f"broken{file[1:]}").write_bytes(whole[:len(whole) // 2])
    for name in ("mot", "chameleon"):
        call(train.main, name, "--out", name, *MIXED)


def begin_training(name, background, place):
    """Begin one of the above, in a process that computes as this one does."""
    bf16 = machine.fast_bf16(torch.device("cpu"))
    background.begin(name, place, [sys.executable, __file__, name, int(bf16)])


def begin_main_job(background, place):
    background.begin("main job", place, [*PROGRAM, "train.py", "mot", "--steps", 2,
                                         "--examples", 400, *FEW])


BEGIN = {"runs": functools.partial(begin_training, "train_systems"),
         "mixed": functools.partial(begin_training, "train_mixed"), "main_job": begin_main_job}


def place_of(background, name):
    place, code, _, errors = background.end(name)
    assert code == 0, errors
    return place


@pytest.fixture(scope="module")
def runs(background):
    """A directory in which every system was trained for three steps on six pictures."""
    return place_of(background, "train_systems")


@pytest.fixture(scope="module")
def mixed(background):
    """A directory in which two systems were trained on pictures, sounds and clips, three each."""
    return place_of(background, "train_mixed")


@pytest.fixture(scope="module")
def main_job(background):
    """Where the main job was run, at a few steps, as a reader runs it."""
    return place_of(background, "main job")


@pytest.fixture
def plain(monkeypatch):
    """Nothing is drawn with matplotlib, which takes most of a short run."""
    for name in ("sheet", "curves", "reconstructions"):
        monkeypatch.setattr(show, name, lambda *arguments, **options: None)


# --- what is refused -----------------------------------------------------------------------------

def everything_below(place):
    return {path: path.read_bytes() for path in sorted(Path(place).rglob("*")) if path.is_file()}


def refused(capsys, main, *argv, place="."):
    """Assert exit code 2, one sentence, and nothing written; -> the sentence."""
    before = everything_below(place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(main, *argv)
    out, sentence = capsys.readouterr()
    assert stopped.value.code == 2
    assert sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
    assert "Traceback" not in out + sentence
    assert everything_below(place) == before
    return sentence


@pytest.mark.parametrize("argv, named", [
    (["mott"], "mott"), ([], "arch"), (["--width", "64", "mot"], "comes first"),
    (["mot", "--stesp", "5"], "--stesp"),
    (["mot", "--steps", "many"], "many"), (["mot", "--step", "5"], "--step"),
    (["mot", "--steps", "0"], "--steps"), (["mot", "--batch-size", "0"], "--batch-size"),
    (["mot", "--caption-dropout", "nan"], "--caption-dropout"),
    (["vqvae", "--steps", "-3"], "--steps"), (["mot", "--cases", "0"], "--cases"),
    (["mot", "--optimizer", "sgd"], "--optimizer"),
    (["mot", "--setting", "vqvae"], "--setting"), (["mot", "--setting"], "--setting"),
    (["mot", "--size", "huge"], "huge"), (["mot", "--device", "tpu"], "tpu"),
    (["vqvae", "--bottleneck", "vae"], "vae"), (["mot", "--picture-size", "33"], "33"),
    (["chameleon", "--patch", "2"], "--patch"), (["mot", "--heads", "3"], "heads"),
    (["mot", "--data", "gone"], "gone"), (["mot", "--data", "loop"], "loop"),
    (["mot", "--seed", "-1"], "--seed"), (["mot", "--seed", "12345"], "scores are measured"),
    (["mot", "--lr", "-1"], "--lr"), (["mot", "--patch", "3"], "--patch"),
    (["vqvae", "--channels", "1"], "--channels"), (["mot", "--seed", str(2 ** 63)], "--seed"),
    (["mot", "--accumulate", "3"], "--accumulate"),
    (["vqvae", "--accumulate", "2"], "--accumulate"), (["mot", "--save-every", "0"], "--save-"),
    (["mot", "--width", "0"], "--width"), (["vqvae", "--codes", "0"], "--codes"),
    (["mot", "--setting=chameleon", "--patch", "2"], "--patch"),
    (["mot", "--towers", "0,1,1"], "0,1,1"), (["mot", "--towers", "a,b,c,d"], "a,b,c,d"),
    (["mot", "--towers", "0,1,2,4"], "0,1,2,4"), (["chameleon", "--towers", "0,0,0,0"], "--towers"),
    (["mot", "--data", "motion", "--picture-size", "64"], "--picture-size"),
    (["vqvae", "--data", "stories", "--examples", "9"], "words"),
    (["mot", "--data", "all", "--examples", "1"], "--examples"),
    (["vqvae", "--towers", "0,1,2,3"], "--towers"), (["vqvae", "--ema", "0.5"], "--ema"),
    (["chameleon", "--setting", "chameleon"], "--setting"), (["mot", "--fsdp"], "torchrun"),
    (["vqvae", "--benchmark"], "--benchmark"), (["mot", "--benchmark", "--resume"], "--benchmark"),
    (["mot", "--benchmark", "--accumulate", "2"], "--benchmark"),
    (["vqvae", "--fsdp"], "--fsdp"),
])
def test_what_the_command_line_cannot_be_is_named(folder, capsys, argv, named):
    (folder.parent / "loop").symlink_to("loop")
    # a folder and few steps matter only where a bad option is let through
    brief = ["--data", folder, "--steps", 1] + (FEW if argv[:1] != ["vqvae"] else [])
    assert named in refused(capsys, train.main, *argv[:1], *(brief if argv else []), *argv[1:])


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named(folder, capsys, device):
    if getattr(torch, "cuda" if device == "cuda" else "mps").is_available():
        pytest.skip(f"this machine has {device}")
    for arch in ("mot", "vqvae"):
        sentence = refused(capsys, train.main, arch, "--data", folder, "--device", device)
        assert f"--device {device}" in sentence


def test_several_processes_need_a_gpu_each_and_no_mps(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto").type == "cpu"
    with pytest.raises(data.InputError, match="--device mps: several processes"):
        machine.pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda"):
        with pytest.raises(data.InputError, match="has 1 for 2 processes"):
            machine.pick_device(name)
    assert machine.pick_device("cpu").type == "cpu"


def test_a_folder_without_pictures_is_named(folder, capsys):
    (folder.parent / "empty").mkdir()
    for arch in ("mot", "vqvae"):
        assert "empty" in refused(capsys, train.main, arch, "--data", "empty")


@pytest.mark.parametrize("line, named", [
    ('{"file_name": "6.png", "text": "x"}', "6.png"), ("not json", "JSON"),
    ('{"file_name": "broken.png", "text": "x"}', "broken.png"), ('{"text": "x"}', "file_name")])
def test_a_bad_line_of_metadata_is_named(folder, capsys, line, named):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with open(folder / "metadata.jsonl", "a") as metadata:
        metadata.write(line)
    sentence = refused(capsys, train.main, "mot", "--data", folder)
    assert "metadata.jsonl, line 7" in sentence and named in sentence


# the last one is no folder's, whoever asks: its permissions promise otherwise
UNWRITABLE = ["pictures/0.png", "pictures/0.png/run",
              pytest.param("/proc/run", marks=pytest.mark.skipif(not os.path.isdir("/proc"),
                                                                 reason="there is no /proc"))]


@pytest.mark.parametrize("out", UNWRITABLE)
@pytest.mark.parametrize("arch", ["mot", "vqvae"])
def test_an_output_folder_that_cannot_be_written_is_named_before_anything_is_trained(
        folder, capsys, out, arch):
    sentence = refused(capsys, train.main, arch, "--data", folder, "--out", out,
                       *(BRIEF if arch == "mot" else ["--steps", 3]))
    assert out in sentence


def test_a_caption_longer_than_the_sequence_is_named(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)             # where the autoencoder is trained already
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(train.main, "mot", "--data", "pictures", "--out", "short", "--steps", 1,
             "--context", 10, *BRIEF)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence.count("\n") == 1
    assert "number" in sentence and "--context" in sentence
    assert not (runs / "short").exists()


@pytest.mark.parametrize("arch, out", [
    ("transfusion", "mot"), ("mot", "mot-chameleon"), ("vqvae", "mot"), ("mot", "vqvae")])
def test_a_run_of_another_kind_is_not_overwritten(runs, capsys, monkeypatch, arch, out):
    monkeypatch.chdir(runs)
    sentence = refused(capsys, train.main, arch, "--data", "pictures", "--out", out, "--steps", 1)
    assert out in sentence and "overwrite" in sentence


def test_an_autoencoder_of_another_bottleneck_is_not_overwritten(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    sentence = refused(capsys, train.main, "vqvae", "--data", "pictures", "--out", "vqvae",
                       "--steps", 1, "--bottleneck", "kl")
    assert "vqvae" in sentence and "overwrite" in sentence


@pytest.mark.parametrize("argv", [["mot"], ["vqvae"], ["mot", "--benchmark"]])
def test_a_folder_of_other_files_is_not_written_to(folder, capsys, argv):
    sentence = refused(capsys, train.main, *argv, "--data", "pictures", "--out", "pictures")
    assert "pictures" in sentence and "other files" in sentence


def test_batches_that_cannot_be_are_named_before_an_autoencoder_is_trained(mixed, capsys,
                                                                           monkeypatch):
    monkeypatch.chdir(mixed)
    monkeypatch.setattr(train, "train_autoencoder", lambda *_: pytest.fail("trained"))
    sentence = refused(capsys, train.main, "mot", "--out", "new", "--data", "mixed",
                       "--picture-size", 24, "--patch", 3)
    assert "--patch" in sentence and "audio" in sentence
    monkeypatch.setattr(data, "good_length", lambda lengths, fill: max(lengths))
    sentence = refused(capsys, train.main, "chameleon", "--out", "new", "--data", "mixed",
                       "--picture-size", 32, "--batch-size", 1)
    assert "--batch-size" in sentence and "span of each modality" in sentence


def write_captions(folder, captions):
    lines = [json.dumps({"file_name": f"{n % 6}.png", "text": text})
             for n, text in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("captions", [["costs $5_^ and $6"] * 6, [""] * 6, ["", "a"] * 3],
                         ids=["mathematics", "empty", "some empty"])
def test_captions_may_be_anything(folder, captions):
    write_captions(folder, captions)
    call(train.main, "mot", "--data", "pictures", "--out", "run", "--steps", 1, *BRIEF, *SMALL)
    report = json.loads(Path("run/report.json").read_text())
    assert 0 <= report["caption_exact"] <= 1
    assert ("caption_token_accuracy" in report) or "" in captions


def test_a_caption_is_not_cut(folder, plain):
    write_captions(folder, ["a" * 300] + ["b"] * 5)
    call(train.main, "mot", "--data", "pictures", "--out", "run", "--steps", 1, *BRIEF, *SMALL)
    kept = checkpoints.load_checkpoint("run")
    longest = max(len(data.Tokenizer(kept["merges"]).encode(text)) for text in ("a" * 300, "b"))
    assert kept["longest_text"] in (longest, 1)         # the long one may be held out
    assert checkpoints.load_system("run").new_text >= kept["longest_text"] + 4


@pytest.mark.filterwarnings("ignore")        # of drawing pictures that are nan
def test_a_loss_that_is_not_a_number_stops_the_run_and_the_checkpoint_before_it_stays(
        runs, folder, capsys, monkeypatch):
    for part in ("runs", "mot"):
        shutil.copytree(runs / part, folder.parent / part)
    kept = Path("mot/checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit):
        call(train.main, "mot", "--data", "pictures", "--out", "mot", "--steps", 150, "--lr", 1e38,
             "--resume", *BRIEF)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: the loss is nan at step") and "--lr" in sentence
    assert Path("mot/checkpoint.pt").read_bytes() == kept


@pytest.mark.parametrize("argv, named", [
    (["mot", "--out", "gone"], "gone"),                                 # no checkpoint there
    (["mot", "--out", "transfusion"], "transfusion"),                   # of another architecture
    (["transfusion", "--out", "vqvae"], "vqvae"),
    (["mot", "--out", "mot-chameleon"], "chameleon"),                   # of another setting
    (["mot", "--out", "mot", "--width", "64"], "64"),                   # of another size
    (["mot", "--out", "mot", "--autoencoder-steps", "6"], "autoencoder"),
    (["mot", "--out", "mot", "--seed", "1"], "mot"),                    # so, another autoencoder
])
def test_a_checkpoint_that_another_run_wrote_is_not_resumed(
        runs, folder, capsys, argv, named):
    out = argv[2]
    for part in ("runs", *({out} & {path.name for path in runs.iterdir()})):
        shutil.copytree(runs / part, folder.parent / part)
    before = everything_below(out)
    with pytest.raises(SystemExit) as stopped:
        call(train.main, argv[0], "--data", "pictures", "--steps", 4, *BRIEF, *argv[1:], "--resume")
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and sentence.startswith("error: ") and named in sentence
    assert everything_below(out) == before


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


def bad_checkpoints(place):
    torch.save({"weights": torch.zeros(3)}, place / "foreign.pt")
    torch.save([1, 2], place / "list.pt")
    torch.save({"format": checkpoints.FORMAT, "arch": "unheard of"}, place / "other.pt")
    for name, number in (("newer", checkpoints.FORMAT + 1), ("older", 1), ("strange", "two"),
                         ("tensor", torch.ones(2))):
        torch.save({"format": number}, place / f"{name}.pt")
    torch.save({"format": checkpoints.FORMAT, "arch": Malice()}, place / "malice.pt")
    (place / "pickle.pt").write_bytes(pickle.dumps(Malice()))
    (place / "garbage.pt").write_bytes(b"not a checkpoint at all" * 50)
    (place / "empty.pt").write_bytes(b"")
    (place / "directory").mkdir()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name, said", [
    ("gone", "no checkpoint"), ("gone.pt", "no checkpoint"), ("directory", "no checkpoint"),
    ("empty.pt", "cut short"), ("garbage.pt", "is not a checkpoint"),
    ("foreign.pt", "this project"), ("list.pt", "this project"), ("other.pt", "lacks"),
    ("newer.pt", "update the code"),
    ("older.pt", "train it again"), ("strange.pt", "this project"), ("tensor.pt", "this project"),
    ("malice.pt", "code perhaps: refused"), ("pickle.pt", "is not a checkpoint")])
def test_what_is_no_checkpoint_is_named_and_no_code_in_it_runs(folder, capsys, name, said):
    bad_checkpoints(folder.parent)
    sentence = refused(capsys, sample.main, name, "a prompt")
    assert name in sentence and said in sentence
    assert sentence[:-1].isprintable()              # no colours of a terminal
    assert not Path("it-ran").exists()


@pytest.mark.parametrize("change, said", [
    ({"arch": "gpt"}, "gpt"), ({"config": {"width": 32, "unknown": 1}}, "cannot build"),
    ({"config": {"width": 64}}, "cannot build"), ({"merges": [[1]]}, "cannot build"),
    ({"merges": [[5000, 1]]}, "cannot build"), ({"longest_text": "long"}, "cannot build"),
    ({"mot": {"towers": [0]}}, "cannot build"),
    ({"autoencoders": {}}, "cannot build"), ({"codecs": 3}, "cannot build")])
def test_a_checkpoint_that_was_changed_is_named(runs, tmp_path, capsys, change, said):
    saved = torch.load(runs / "mot" / "checkpoint.pt", weights_only=True)
    torch.save({**saved, **change}, tmp_path / "changed.pt")
    sentence = refused(capsys, sample.main, tmp_path / "changed.pt", "x", place=tmp_path)
    assert "changed.pt" in sentence and said in sentence


@pytest.mark.parametrize("change", [
    {"arch": ["mot"]}, {"train": 3}, {"model": {}}, {"autoencoders": {"image": {}}},
    {"autoencoders": {}}, {"optimizers": []}])
def test_a_checkpoint_that_was_changed_is_not_resumed(runs, folder, capsys, change):
    for part in ("runs", "mot"):
        shutil.copytree(runs / part, folder.parent / part)
    saved = torch.load("mot/checkpoint.pt", weights_only=True)
    torch.save({**saved, **change}, "mot/checkpoint.pt")
    before = everything_below("mot")
    with pytest.raises(SystemExit) as stopped:
        call(train.main, "mot", "--data", "pictures", "--steps", 4, *BRIEF, "--out", "mot",
             "--resume")
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and sentence.startswith("error: ")
    assert "checkpoint.pt" in sentence or '"mot"' in sentence
    assert everything_below("mot") == before


def test_a_cut_checkpoint_is_named(runs, tmp_path, capsys):
    whole = (runs / "mot" / "checkpoint.pt").read_bytes()
    for part in (len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pt").write_bytes(whole[:part])
        assert "cut.pt" in refused(capsys, sample.main, tmp_path / "cut.pt", "x", place=tmp_path)


def test_an_autoencoder_is_not_talked_to(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert "autoencoder" in refused(capsys, sample.main, "vqvae", "a prompt")


@pytest.mark.parametrize("argv, named", [
    (["mot", "--image", "gone.png"], "gone.png"),
    (["mot", "--temperature", "-1"], "--temperature"), (["mot", "--guidance", "nan"], "--guidance"),
    (["mot", "--seed", "-1"], "--seed"), (["mot", "a \udcff prompt"], "prompt"),
    (["mot", "--image", "pictures/metadata.jsonl"], "metadata.jsonl"),
    (["mot", "a prompt", "--image", "pictures/0.png"], "--image"),
    (["mot", "a prompt", "--out", "gone/picture.png"], "gone"),
    (["mot", "a prompt", "--out", "picture.docx"], "picture.docx"),
    (["mot", "a prompt", "--out", "pictures"], "pictures"),
    (["mot", "--out", "pictures"], "pictures"),
    (["mot", "--out", "pictures/0.png"], "would hold words"),           # nor that:
    (["mot", "--image", "pictures/0.png", "--out", "pictures/0.png"], "would hold words"),
    (["mot", "--image", "pictures/0.png", "--out", "mot/checkpoint.pt"], "would hold words"),
    (["mot", "--image", "pictures/0.png", "--to", "image", "--out", "pictures/0.png"], "was read"),
    (["mot", "--image", "gone\n\x1b[31m.png"], r"gone\n\x1b[31m.png"),
    (["mot", "a prompt", "--device", "tpu"], "tpu"), ([], "run"),
    (["mot", "a prompt", "--guidence", "2"], "--guidence"),
])
def test_what_sample_cannot_do_is_named(runs, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(runs)
    assert named in refused(capsys, sample.main, *argv)


@pytest.mark.parametrize("argv, named", [
    (["mot", "--audio", "mixed/0.wav", "--video", "mixed/0.gif"], "--audio"),
    (["mot", "a prompt", "--audio", "mixed/0.wav"], "--audio"),
    (["mot", "--audio", "broken.wav"], "broken.wav"),
    (["mot", "--video", "broken.gif"], "broken.gif"), (["mot", "--video", "gone.gif"], "gone.gif"),
    (["mot", "--audio", "mixed/0.png"], "0.png"), (["mot", "--video", "mixed/0.wav"], "0.wav"),
    (["mot", "--audio", "mixed/0.wav", "--to", "video", "--out", "gone/clip.gif"], "gone"),
    (["chameleon", "a prompt", "--to", "audio", "--out", "gone/sound.wav"], "gone"),
    (["mot", "a prompt", "--to", "smell"], "smell"), (["mot", "--to", "audio"], "--to"),
    (["mot", "a prompt", "--to", "audio", "--out", "a.mp3"], "a.mp3"),
    (["mot", "a prompt", "--to", "video", "--out", "a.mp4"], "a.mp4"),
    (["mot", "--audio", ""], "sound"),
])
def test_what_sample_cannot_do_with_sounds_and_clips_is_named(
        mixed, capsys, monkeypatch, argv, named):
    monkeypatch.chdir(mixed)
    assert named in refused(capsys, sample.main, *argv)


@pytest.mark.parametrize("argv", [["--audio", FILE["audio"]], ["--video", FILE["video"]],
                                  ["a prompt", "--to", "audio"], ["a prompt", "--to", "video"],
                                  ["--image", FILE["image"], "--to", "video"]])
def test_a_model_of_pictures_alone_is_not_asked_for_others(runs, mixed, capsys, monkeypatch, argv):
    monkeypatch.chdir(runs)
    argv = [mixed / word if word in FILE.values() else word for word in argv]
    sentence = refused(capsys, sample.main, "mot", *argv)
    assert "not trained on it" in sentence and sentence.rstrip().endswith("image")
    assert argv[0] in sentence or "--to" in sentence


def test_a_model_that_would_go_on_with_words_alone_asks_what_shall_follow():
    class Says:
        codecs, begun = {"image": None, "audio": None}, [("audio", 7)]

        def complete(self, prompts, **settings):
            return [[*prompt, *self.begun] for prompt in prompts]
    system = Says()
    assert sample.answer(system, ("text", "go"), None, {}) == ("audio", 7)
    system.begun = []
    with pytest.raises(data.InputError, match="--to"):
        sample.answer(system, ("text", "go"), None, {})


def test_a_run_with_other_towers_is_not_resumed(mixed, capsys, monkeypatch):
    monkeypatch.chdir(mixed)
    sentence = refused(capsys, train.main, "mot", "--out", "mot", *MIXED, "--towers", "0,1,2,1",
                       "--resume")
    assert "--towers" in sentence and "0,1,2,1" in sentence and "0,1,2,3" in sentence


@pytest.mark.parametrize("argv, shown", [
    (["chameleon"], {"steps": "2700", "weight-decay": "0.4", "heads": "8"}),
    (["chameleon", "--data", "all"], {"steps": "7300", "optimizer": "muon",
                                      "reading-weight": "25.0", "text-only-weight": "4.0",
                                      "code-noise": "0.95"}),
    (["mot", "--size=base"], {"steps": "20000", "lr": "0.0004", "heads": "12", "depth": "14"}),
    (["mot", "--setting", "chameleon"], {"lr": "0.003", "code-noise": "0.6"}),
    (["vqvae", "--bottleneck", "kl"], {"steps": "1200"})])
def test_help_shows_the_defaults_of_the_data_and_size_that_are_named(argv, shown, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.arguments([*argv, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, default in shown.items():
        assert re.search(rf"--{name} [A-Z]+ [^\[]*\[{default}\]", text), name


def test_presets_fill_in_what_was_not_given_and_nothing_else():
    presets = "chameleon", "chameleon all", "base"
    for given, expected in (([], (7300, 4e-3, 0.1)), (["--weight-decay", "0"], (7300, 4e-3, 0)),
                            (["--steps", "7", "--lr", "0.2"], (7, 0.2, 0.1))):
        config = train.with_presets(train.arguments(["chameleon", *given])[0], *presets[:2])
        assert (config.steps, config.lr, config.weight_decay) == expected
    config = train.with_presets(train.TrainConfig(), *presets)      # that of the size goes first
    assert (config.steps, config.lr, config.weight_decay) == (20_000, 4e-4, 0.1)


def test_presets_of_a_model_hold_for_its_data_unless_given():
    corpus = corpora.toy_corpus("all", np.random.default_rng(0), 60)
    for name, given, expected in (("all", {}, 25.0), ("all", {"reading_weight": 3.0}, 3.0),
                                  ("own", {}, 8.0)):
        config = train.TrainConfig(batch_size=8, picture_size=32, read_share=0.5,
                                   caption_dropout=0.25)
        model, batches, *_ = train.prepare("chameleon", "chameleon", config, given, corpus, None,
                                           name, torch.device("cpu"), trained=False)
        assert model.config.reading_weight == expected
        assert [(stream.read, stream.drop) for stream in batches.streams] == [(0.5, 0.25)] * 2


def test_the_share_of_stories_is_that_of_all_batches_and_none_of_them_is_spent():
    corpus = corpora.toy_corpus("all", np.random.default_rng(0), 600)
    config = train.TrainConfig(batch_size=14, picture_size=32, read_share=0.5, caption_dropout=0.0)
    _, batches, _, about = train.prepare("chameleon", "chameleon", config, {}, corpus, None, "all",
                                         torch.device("cpu"), trained=False)
    state = copy.deepcopy(batches.state)
    share = train.share_of_stories(batches, data.Tokenizer(about["merges"]))
    alone = sum(len(document) == 1 and document[0][0] == "text" for document in corpus.documents)
    assert share == pytest.approx(alone / len(corpus.documents), abs=0.015) and share > 0.1
    assert batches.state == state


def test_a_refusal_is_an_exit_code_and_one_line_for_the_shell():
    done = subprocess.run([*PROGRAM, "train.py", "mott"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# --- what is written -----------------------------------------------------------------------------

def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@every_system
def test_a_run_writes_its_files_and_its_report(runs, name):
    run, report = runs / name, json.loads((runs / name / "report.json").read_text())
    assert FILES | {"transcript.md"} <= {path.name for path in run.iterdir()}
    assert KEYS <= report.keys()
    assert (report["arch"], report["steps"]) == (SYSTEMS[name][0], 3)
    assert report["active_parameters"] <= report["parameters"]
    for score in ("caption_token_accuracy", "caption_exact"):
        assert 0 <= report[score] <= 1 and report[f"{score}_n"] == 1
    assert report["reconstruction_psnr"] > 0 and report["reconstruction_psnr_n"] == 1
    assert [row["step"] for row in metrics(run)] == [3]
    assert all(np.isfinite(row["loss"]) for row in metrics(run))
    for picture in ("curves.png", "samples.png"):
        with Image.open(run / picture) as image:
            assert min(image.size) > 200


def test_a_caption_is_printed_and_written_where_out_says(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    capsys.readouterr()
    call(sample.main, "mot", "--image", "pictures/0.png", "--out", tmp_path / "caption.txt")
    printed, wrote = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert (tmp_path / "caption.txt").read_text() == printed + "\n" and "caption.txt" in wrote
    assert "--out" in refused(capsys, sample.main, "mot", "--image", "pictures/0.png",
                              "--out", "gone/caption.txt")


def test_vqvae_writes_its_files_and_its_report(runs):
    report = json.loads((runs / "vqvae" / "report.json").read_text())
    assert FILES <= {path.name for path in (runs / "vqvae").iterdir()} and KEYS <= report.keys()
    assert 0 < report["codes_used"] <= 1 <= report["perplexity"] <= 512


def test_one_autoencoder_of_each_kind_is_trained_and_shared(runs):
    assert len(list((runs / "runs").glob("vqvae-kl-*"))) == 1
    assert len(list((runs / "runs").glob("vqvae-vq-*"))) == 1


def test_an_autoencoder_is_reused_for_the_same_pictures_alone(runs, folder, plain):
    shutil.copytree(runs / "runs", folder.parent / "runs")
    kept = next(Path("runs").glob("vqvae-kl-*")) / "checkpoint.pt"
    written = kept.stat().st_mtime_ns
    argv = ["mot", "--data", "pictures", "--out", "mot", "--steps", 1, *BRIEF]
    call(train.main, *argv)
    assert kept.stat().st_mtime_ns == written
    assert len(list(Path("runs").glob("vqvae-kl-*"))) == 1
    for path in folder.glob("*.png"):
        Image.new("RGB", (32, 32), (0, 99, 0)).save(path)
    call(train.main, *argv)
    assert kept.stat().st_mtime_ns == written
    assert len(list(Path("runs").glob("vqvae-kl-*"))) == 2


def test_an_autoencoder_that_was_changed_is_named(runs, folder, capsys):
    shutil.copytree(runs / "runs", folder.parent / "runs")
    kept = next(Path("runs").glob("vqvae-kl-*")) / "checkpoint.pt"
    saved = torch.load(kept, weights_only=True)
    for change in ({"autoencoder": {}}, {"stream": {}}):
        torch.save({**saved, **change}, kept)
        sentence = refused(capsys, train.main, "mot", "--data", "pictures", "--out", "mot",
                           "--steps", 1, *BRIEF)
        assert str(kept) in sentence and "cannot build" in sentence


@every_system
def test_a_checkpoint_holds_tensors_and_plain_values_alone(runs, name):
    saved = torch.load(runs / name / "checkpoint.pt", weights_only=True)
    assert saved["arch"] == SYSTEMS[name][0] and saved["step"] == 3
    assert {"format", "versions", "config", "train", "model", "ema", "optimizers", "stream",
            "merges"} <= saved.keys()
    assert "latent_std" in saved["autoencoders"]["image"]["weights"]
    assert saved["versions"]["torch"] == torch.__version__


def test_mot_has_more_parameters_than_its_host_and_as_many_active_ones(runs):
    def report(name):
        return json.loads((runs / name / "report.json").read_text())
    for host, name in (("transfusion", "mot"), ("chameleon", "mot-chameleon")):
        assert report(name)["parameters"] > 1.3 * report(host)["parameters"]
        assert report(name)["active_parameters"] == report(host)["active_parameters"]
        assert report(name)["flops"] == report(host)["flops"]


@every_system
@pytest.mark.filterwarnings("error::UserWarning")
def test_sample_writes_a_picture_a_caption_and_a_document(
        runs, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(sample.main, runs / name, "number 1")
    with Image.open("sample.png") as picture:
        assert picture.mode == "RGB" and picture.width == picture.height
    capsys.readouterr()
    call(sample.main, runs / name / "checkpoint.pt", "--image", runs / "pictures" / "0.png")
    assert capsys.readouterr().out.endswith("\n")
    call(sample.main, runs / name, "--out", "story.md")
    story = Path("story.md").read_text(encoding="utf-8")
    for picture in tmp_path.glob("story-*.png"):
        assert f"({picture.name})" in story
    with Image.open("sample.png") as before:
        pixels = np.asarray(before)
    call(sample.main, runs / name, "number 1", "--out", "again.png")
    with Image.open("again.png") as after:
        assert np.array_equal(pixels, np.asarray(after))


@pytest.mark.parametrize("name", ["mot", "chameleon"])
def test_a_run_on_files_of_three_kinds_writes_scores_of_each(mixed, name):
    run, report = mixed / name, json.loads((mixed / name / "report.json").read_text())
    assert FILES | {"transcript.md"} <= {path.name for path in run.iterdir()}
    assert KEYS <= report.keys() and report["data"] == "mixed"
    for prefix in ("", "audio_", "video_"):
        for score in ("caption_token_accuracy", "caption_exact", "reconstruction_psnr"):
            assert report[f"{prefix}{score}_n"] == 1
            least, most = (0, 100) if "psnr" in score else (0, 1)
            assert least <= report[prefix + score] <= most
    assert {"text", "image", "audio", "video"} <= metrics(run)[0].keys()
    assert all(np.isfinite(row["loss"]) for row in metrics(run))
    bottleneck = "kl" if name == "mot" else "vq"
    kinds = [json.loads((path / "report.json").read_text())["reads"]
             for path in (mixed / "runs").glob(f"vqvae-{bottleneck}-mixed-*")]
    assert sorted(kinds) == ["audio", "image", "video"]


def check_file(path, name):
    """Assert that a file is a signal of that modality, as `sample.py` writes and reads them."""
    if name == "audio":
        with wave.open(str(path)) as file:
            assert file.getparams()[:4] == (1, 2, tones.RATE, tones.LENGTH)
        assert media.read_sound(path, tones.LENGTH, tones.RATE).shape == (1, tones.LENGTH)
        return
    with Image.open(path) as picture:
        if name == "image":
            assert picture.size == (8 * PIXELS, 8 * PIXELS)
            assert media.read_picture(path, PIXELS).shape == (3, PIXELS, PIXELS)
            return
        lasts = 0
        for frame in range(picture.n_frames):       # equal ones are one that lasts longer
            picture.seek(frame)
            lasts += picture.info["duration"]
        assert (picture.format, picture.size, lasts) == ("GIF", (4 * PIXELS, 4 * PIXELS), 8 * 250)
    assert media.read_video(path, 8, PIXELS).shape == (8, 3, PIXELS, PIXELS)


@pytest.mark.parametrize("before", ["text", *FILE])
@pytest.mark.parametrize("name", ["mot", "chameleon"])
def test_sample_writes_each_kind_of_file_after_each_kind_of_input(
        mixed, tmp_path, monkeypatch, capsys, name, before):
    monkeypatch.chdir(tmp_path)
    given = ["a prompt"] if before == "text" else [f"--{before}", mixed / FILE[before]]
    for kind, suffix in sample.SUFFIX.items():
        call(sample.main, mixed / name, *given, "--to", kind)
        assert [path.name for path in tmp_path.iterdir()] == ["sample" + suffix]
        check_file(tmp_path / f"sample{suffix}", kind)
        assert capsys.readouterr().out == f"wrote sample{suffix}\n"
        os.remove("sample" + suffix)
    if before == "audio":
        call(sample.main, mixed / name, *given, "--to", "video", "--out", "other.gif")
        assert [path.name for path in tmp_path.iterdir()] == ["other.gif"]


@pytest.mark.parametrize("name", ["mot", "chameleon"])
def test_sample_prints_what_the_model_says_of_a_file_and_how_it_goes_on_with_words(
        mixed, monkeypatch, capsys, name):
    monkeypatch.chdir(mixed)
    before, system, said = everything_below("."), checkpoints.load_system(name), set()
    for kind, file in FILE.items():
        signal = {"image": lambda path: media.read_picture(path, PIXELS),
                  "audio": lambda path: media.read_sound(path, tones.LENGTH, tones.RATE),
                  "video": lambda path: media.read_video(path, 8, PIXELS)}[kind](file)
        expected = system.caption(data.to_signal(signal)[None], kind)
        for more in [[], ["--to", "text"]][:1 + (kind == "video")]:
            capsys.readouterr()
            call(sample.main, name, f"--{kind}", file, *more)
            assert capsys.readouterr().out == expected[0] + "\n"
        said |= set(expected)
    assert len(said) > 1
    call(sample.main, name, "a prompt", "--to", "text")
    assert capsys.readouterr().out.startswith("a prompt")
    assert everything_below(".") == before


@pytest.mark.parametrize("name", ["mot", "chameleon"])
def test_a_free_document_is_written_with_its_files(mixed, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    call(sample.main, mixed / name)
    assert Path("sample.md").is_file()
    random, drawn = torch.Generator().manual_seed(0), []
    for shape in ((3, PIXELS, PIXELS), (1, tones.LENGTH), (8, 3, PIXELS, PIXELS)):
        drawn.append(torch.rand(shape, generator=random) - 0.5)
    document = [("text", "one"), ("image", drawn[0]), ("audio", drawn[1]), ("text", "two"),
                ("video", drawn[2]), ("image", None)]
    monkeypatch.setattr(system.System, "complete", lambda self, prompts, **_: [document])
    call(sample.main, mixed / name, "--out", "story.md")
    assert Path("story.md").read_text(encoding="utf-8").split("\n\n") == [
        "one", "![image 1](story-1.png)", "[audio 2](story-2.wav)", "two",
        "![video 3](story-3.gif)\n"]
    for kind, file in (("image", "story-1.png"), ("audio", "story-2.wav"),
                       ("video", "story-3.gif")):
        check_file(file, kind)


def test_towers_that_are_shared_are_trained_saved_and_loaded(mixed, monkeypatch, plain):
    monkeypatch.chdir(mixed)
    call(train.main, "mot", "--out", "three", *MIXED, "--towers", "0,1,2,1")
    model = checkpoints.load_system("three").model
    untied = [module for module in model.modules() if isinstance(module, mot.Untied)]
    assert untied and all((len(module.copies), list(module.towers)) == (3, [0, 1, 2, 1])
                          for module in untied)
    three, four = (json.loads(Path(run, "report.json").read_text()) for run in ("three", "mot"))
    tower = (four["parameters"] - four["active_parameters"]) / 3
    assert three["parameters"] == three["active_parameters"] + 2 * tower
    assert three["active_parameters"] == four["active_parameters"]


@pytest.mark.parametrize("data, kind", [("tones", "audio"), ("motion", "video")])
def test_a_world_of_sounds_or_clips_alone_is_trained_on_drawn_and_scored(
        tmp_path, monkeypatch, data, kind):
    monkeypatch.chdir(tmp_path)
    drawn, draw = [], show.draw_signal
    monkeypatch.setattr(show, "draw_signal", lambda axis, name, signal, title="": (
        drawn.append((name, signal.shape)), draw(axis, name, signal, title)))
    call(train.main, "mot", "--data", data, "--examples", 60, "--steps", 2, "--cases", 2,
         "--autoencoder-steps", 2, "--batch-size", 4, *SMALL[2:])
    run = Path(f"runs/mot-{data}")
    report = json.loads((run / "report.json").read_text())
    for score in ("generation_exact", "generation_exact_heldout", "caption_exact",
                  "reconstruction_exact"):
        assert report[f"{kind}_{score}_n"] and 0 <= report[f"{kind}_{score}"] <= 1
        assert score not in report                                  # that is of pictures
    assert FILES | {"transcript.md"} <= {path.name for path in run.iterdir()}
    assert {"text", kind} <= metrics(run)[0].keys()
    shape = {"audio": (1, tones.LENGTH), "video": (8, 3, 32, 32)}[kind]
    assert len(drawn) >= 4 and set(drawn) == {(kind, shape)}        # true ones and generated ones


def test_words_alone_are_trained_on_and_scored_beside_their_entropy(tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    call(train.main, "mot", "--data", "stories", "--examples", 60, "--steps", 2, "--cases", 4,
         *SMALL[2:])
    report = json.loads(Path("runs/mot-stories/report.json").read_text())
    assert report["text_loss_n"] == 4 and report["text_loss"] > report["text_entropy"] > 0
    assert 0 < report["text_excess"] < report["text_loss"]
    assert report["parameters"] == report["active_parameters"]      # one tower: that of words
    assert not list(Path("runs").glob("vqvae-*"))


def test_vqvae_trains_an_autoencoder_of_each_kind_that_a_folder_needs(mixed, monkeypatch):
    monkeypatch.chdir(mixed)
    draw_little(monkeypatch)
    call(train.main, "vqvae", "--data", "mixed", "--out", "both", "--steps", 2, "--batch-size", 4,
         "--picture-size", PIXELS)
    scores = {"image": {"reconstruction_psnr"}, "audio": {"audio_reconstruction_psnr"},
              "video": {"video_reconstruction_psnr"}}
    assert {path.name for path in Path("both").iterdir()} == set(scores)
    for kind, names in scores.items():
        run = Path("both", kind)
        report = json.loads((run / "report.json").read_text())
        assert FILES <= {path.name for path in run.iterdir()} and KEYS <= report.keys()
        assert {name for name in report if name.endswith("psnr")} == names
        assert (report["reads"], report["setting"]) == (kind, "vq")
        assert 0 < report["codes_used"] <= 1 <= report["perplexity"] <= 512
        kept = checkpoints.load_checkpoint(run)["autoencoder"]
        config = checkpoints.load_autoencoder(kept).config
        assert config.channels == (1 if kind == "audio" else 3)


def test_vqvae_does_not_overwrite_another_run_in_a_folder_of_a_kind(mixed, runs, capsys, tmp_path):
    (tmp_path / "audio").mkdir()
    shutil.copy(runs / "mot" / "checkpoint.pt", tmp_path / "audio")
    assert "audio" in refused(capsys, train.main, "vqvae", "--data", mixed / "mixed", "--out",
                              tmp_path, "--steps", 1, place=tmp_path)


def test_the_main_job_at_a_few_steps_as_a_reader_runs_it(main_job):
    folder = main_job / "runs" / "mot"
    report = json.loads((folder / "report.json").read_text())
    assert KEYS | SCORES | {f"{name}_n" for name in SCORES} <= report.keys()
    assert report["reconstruction_psnr"] > 0 and report["reconstruction_psnr_n"] >= 4
    for name in SCORES:
        assert 0 <= report[name] <= 1 and report[f"{name}_n"] >= 4
    assert (report["setting"], report["data"], report["seed"]) == ("transfusion", "shapes", 0)
    assert FILES | {"transcript.md"} <= {path.name for path in folder.iterdir()}
    assert (folder / "progress/step-000001.png").is_file()


def test_a_sound_is_shown_by_its_waveform_and_spectrum_and_a_clip_frame_by_frame():
    rng, axes = np.random.default_rng(0), Figure().subplots(1, 2)
    sound = tones.render(tones.sample(rng), rng)
    show.draw_signal(axes[0], "audio", sound)
    wave, spectrum = axes[0].child_axes
    assert np.array_equal(wave.lines[0].get_ydata(), sound[0])
    shown = vqvae.spectrum(torch.from_numpy(sound)[None])[0, 0].numpy()
    assert np.array_equal(spectrum.images[0].get_array(), shown)
    assert spectrum.images[0].origin == "lower"                     # high notes are high up
    clip = motion.render(motion.Scene("grey", "small", "red", "circle", "moves fast", "right"), rng)
    show.draw_signal(axes[1], "video", clip)
    strip = axes[1].images[0].get_array()
    places = [min(left for left in range(strip.shape[1] - 31)       # where each frame is
                  if np.array_equal(strip[2:34, left:left + 32], frame.transpose(1, 2, 0)))
              for frame in data.to_bytes(clip)]
    assert places == sorted(set(places)) and min(np.diff(places)) > 32


def test_a_sheet_tells_right_from_wrong_in_green_and_red(tmp_path, monkeypatch):
    said, finds = [], "Max finds four small cyan squares, and Eva finds one small blue square."
    stories = [f"Max and Eva look for things. {finds} now {who} has more things."
               for who in ("Max", "Eva")] + ["Max has.", "Max has two."]
    monkeypatch.setattr(show, "_say", lambda axis, text, letters, colour="black":
                        said.append((text, colour)))

    def draw(texts, name):              # two are right, one is another's, one is blank
        world, rng = corpora.WORLDS[name], np.random.default_rng(0)
        scenes = [*map(world.parse, texts[:2]), world.sample(rng), world.sample(rng)]
        signals = [torch.from_numpy(world.render(scene, rng)) for scene in scenes]
        return [*signals[:3], torch.zeros_like(signals[3])]

    def caption(true, name):            # the last is not one
        world = corpora.WORLDS[name]
        return [world.describe(world.grade(signal.numpy())) for signal in true[:3]] + ["a thing."]

    kinds = ("image", "audio", "video")
    knows = SimpleNamespace(codecs=dict.fromkeys(kinds), picture_size=32, draw=draw,
                            caption=caption, complete=lambda documents, spans:
                            [[("text", story)] for story in stories])
    show.sheet(knows, tmp_path / "sheet.png", "title", told=True)
    assert (tmp_path / "sheet.png").is_file() and len(said) == 4 * 4 * 3
    for kind in range(len(kinds)):
        rows = [said[i:i + 3] for i in range(12 * kind, 12 * kind + 12, 3)]
        assert [colour for row in rows for _, colour in row] == [
            "black", "green", "green", "black", "green", "green",
            "black", "firebrick", "green", "black", "firebrick", "firebrick"]
        assert [row[1][0].partition(":")[0] for row in rows] == [
            "right", "right", "wrong", "unreadable"]
        assert [row[0][0].startswith("[unseen pair] ") for row in rows] == [False] * 3 + [True]
    assert said[38::3] == [("right", "green"), ("its answer is wrong", "firebrick"),
                           *[("not a story", "firebrick")] * 2]


def test_there_are_no_curves_before_the_first_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    show.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    assert not (tmp_path / "curves.png").exists()


def test_a_loss_that_the_last_row_lacks_has_its_panel(tmp_path, monkeypatch):
    rows = [{"step": 50, "text": 1.0, "image": 2.0}, {"step": 51, "text": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = []
    monkeypatch.setattr(show, "_finish", lambda figure, *_: drawn.extend(
        axis.lines[0].get_label() for axis in figure.axes if axis.lines))
    show.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    assert drawn == ["text", "image"]


def test_curves_are_drawn_although_a_noise_level_was_never_met(tmp_path):
    row = {"step": 1, "loss": 2.0, "lr": 0.1, "seconds": 1.0, "gradient_norm": 1.0, "text": 1.0,
           "image": None, "image_noise_0": None, "image_noise_1": 1.0, "text_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    show.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").stat().st_size > 1000


# --- runs repeat ---------------------------------------------------------------------------------

def losses(run):
    return [{name: value for name, value in row.items() if name != "seconds"}
            for row in metrics(run)]


@pytest.mark.parametrize("name", ["mot", "chameleon"])
def test_two_runs_with_one_seed_have_the_same_losses(runs, name, monkeypatch, plain):
    monkeypatch.chdir(runs)
    call(train.main, *SYSTEMS[name], "--data", "pictures", "--out", f"{name}-again", "--steps", 3,
         *BRIEF)
    assert losses(runs / f"{name}-again") == losses(runs / name)


def test_resume_goes_on_from_the_last_step(runs, monkeypatch, plain):
    monkeypatch.chdir(runs)
    arguments = ["transfusion", "--data", "pictures", "--out", "longer", *BRIEF]
    call(train.main, *arguments, "--steps", 2)
    call(train.main, *arguments, "--steps", 4, "--resume")
    assert [row["step"] for row in metrics(runs / "longer")] == [2, 4]
    assert json.loads((runs / "longer" / "report.json").read_text())["steps"] == 4


def stopped_at(step, monkeypatch, *argv):
    """Run a command that is asked to stop after so many steps."""
    with monkeypatch.context() as patch:
        looks = iter([False] * (step - 1) + [True])
        patch.setattr(trainer, "any_of", lambda *flags: (next(looks), False))
        with pytest.raises(SystemExit) as stopped:
            call(train.main, *argv)
    assert stopped.value.code == 130


@every_system
def test_a_run_goes_on_elsewhere_and_as_it_began_to_the_very_same_weights(
        runs, folder, name, monkeypatch, capsys, plain):
    """Without its autoencoder's folder, which is in the checkpoint, and without its options."""
    arguments = [*SYSTEMS[name], "--data", "pictures"]
    options = ["--steps", 6, "--lr", 0.003, "--warmup", 1, "--ema", 0.9, "--depth", 1, *BRIEF]
    shutil.copytree(runs / "runs", "runs")
    call(train.main, *arguments, *options, "--out", "straight")
    stopped_at(4, monkeypatch, *arguments, *options, "--out", "stopped")
    shutil.rmtree("runs")
    monkeypatch.setitem(machine.FAST_BF16, "cpu", not machine.FAST_BF16["cpu"])    # as if measured
    call(train.main, *arguments, "--out", "stopped", "--resume")
    assert not Path("runs").exists()                # no autoencoder was trained
    one, other = (checkpoints.load_checkpoint(run) for run in ("straight", "stopped"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
    assert {**one["train"], "out": ""} == {**other["train"], "out": ""} and one["step"] == 6
    for option, value in (("--ema", 0.5), ("--context", 512), ("--batch-size", 4), ("--depth", 2)):
        sentence = refused(capsys, train.main, *arguments, "--out", "stopped", "--resume", option,
                           value)
        assert option in sentence and str(value) in sentence
    Image.new("RGB", (32, 32), "white").save(folder / "0.png")
    assert "other data" in refused(capsys, train.main, *arguments, "--out", "stopped", "--resume")


def test_a_new_run_in_the_folder_of_an_old_one_is_not_mistaken_for_it(runs, folder, monkeypatch,
                                                                      capsys, plain):
    for part in ("runs", "mot"):
        shutil.copytree(runs / part, part)
    old = Path("mot/checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:            # it dies before it has saved
        patch.setattr(trainer.Trainer, "train_step", lambda self: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            call(train.main, "mot", "--data", "pictures", "--out", "mot", "--steps", 9, *BRIEF)
    assert Path("mot/previous.pt").read_bytes() == old
    with pytest.raises(SystemExit):
        call(train.main, "mot", "--data", "pictures", "--out", "mot", "--resume")
    assert "no checkpoint" in capsys.readouterr().err


class Tidied:
    """What Python tidies up as SIGTERM arrives; all that is raised there is dropped."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)


@pytest.mark.parametrize("tidying", [False, True])
def test_sigterm_outside_of_training_is_one_sentence_too(capsys, tidying):
    def main():
        if tidying:
            Tidied()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        pytest.fail("it went on")
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(SystemExit) as stopped:
        sample.run(main)
    assert stopped.value.code == 130
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before
    assert capsys.readouterr().err == "stopped; what was saved before is kept\n"


def test_an_autoencoder_that_stopped_while_it_was_scored_is_scored_again(folder, monkeypatch,
                                                                         plain):
    arguments = ["vqvae", "--data", folder, "--steps", 3, "--batch-size", 4, "--out", "vqvae"]
    with monkeypatch.context() as patch:
        patch.setattr(autoencoders, "autoencoder_scores", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            call(train.main, *arguments)
    assert checkpoints.load_checkpoint("vqvae")["step"] == 3
    monkeypatch.setattr(trainer.Trainer, "train_step", lambda self: pytest.fail("trained again"))
    call(train.main, *arguments)
    assert json.loads(Path("vqvae/report.json").read_text())["steps"] == 3


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_an_autoencoder_that_was_stopped_goes_on_to_the_very_same_weights(
        folder, capsys, monkeypatch, plain, bottleneck):
    arguments = ["vqvae", "--data", folder, "--steps", 6, "--batch-size", 4, "--bottleneck",
                 bottleneck]
    call(train.main, *arguments, "--out", "straight")
    with monkeypatch.context() as patch:
        looks = iter([False, False, True])
        patch.setattr(trainer, "any_of", lambda *flags: (next(looks), False))
        with pytest.raises(SystemExit) as stopped:
            call(train.main, *arguments, "--out", "stopped")
    assert stopped.value.code == 130
    assert "step 3; to go on, give the same command again" in capsys.readouterr().err
    call(train.main, *arguments, "--out", "stopped", "--resume")
    assert "goes on from step 3" in capsys.readouterr().out
    one, other = (checkpoints.load_checkpoint(name) for name in ("straight", "stopped"))
    assert one.keys() == other.keys() and "stream" not in one
    weights = [kept["autoencoder"]["weights"] for kept in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    sentence = refused(capsys, train.main, *arguments, "--out", "stopped", "--resume", "--seed", 1)
    assert "--resume" in sentence and "stopped" in sentence


def test_looking_at_samples_does_not_change_the_training(runs, monkeypatch, plain):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(show, "sheet", lambda *arguments, **options: torch.rand(1))
    call(train.main, "transfusion", "--data", "pictures", "--out", "blind", "--steps", 3, *BRIEF)
    assert losses(runs / "blind") == losses(runs / "transfusion")


if __name__ == "__main__":          # begun beside other tests: see begin_training
    machine.FAST_BF16["cpu"] = bool(int(sys.argv[2]))
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        {"train_systems": train_systems, "train_mixed": train_mixed}[sys.argv[1]]()
