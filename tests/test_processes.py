"""Several processes (torchrun, gloo on CPU) train as one process does on the same batches."""

import contextlib
import copy
import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import small
from adapter import PROGRAM, load
from test_command_line import call, plain, write_folder  # noqa: F401 (a fixture)
from test_trainer import small_trainer

train, trainer, vqvae, muon = load("train"), load("trainer"), load("vqvae"), load("muon")

TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = [PROGRAM[1], "train.py", "mot", "--data", "pictures", "--out", "run", "--width", "32",
         "--depth", "1", "--heads", "2", "--hidden", "64", "--autoencoder-steps", "2",
         "--cases", "2", "--picture-size", "16"]
STEPS = 52
PICTURES = {"size": (16, 16), "widths": (8, 16), "codes": 16, "dead_below": 1e-9}
COMMANDS = {"two": [__file__],
            "ddp": [*TRAIN, "--steps", "2", "--batch-size", "8"],
            "fsdp": [*TRAIN, "--steps", "2", "--batch-size", "8", "--fsdp"],
            "does not split": [*TRAIN, "--steps", "2", "--batch-size", "7"]}


def begin(setting, folder, accumulate=1, sharded=False):
    """A small model's trainer, in fp32; Chameleon's blocks learn by Muon."""
    trainer.precision = lambda device: contextlib.nullcontext()
    muon.fast_bf16 = lambda device: False
    optimizer = "muon" if setting == "chameleon" else "adamw"
    with mock.patch.dict(small.SIZE, depth=1):
        run = small_trainer(setting, folder, seed=0, optimizer=optimizer, sharded=sharded)
    run.config = dataclasses.replace(run.config, steps=STEPS, accumulate=accumulate)
    run.model.train()
    return run


def losses_of(run, steps=STEPS):
    """The losses of its next steps, and all that going on needs."""
    return [run.train_step()["loss"].item() for _ in range(steps)], run.state()


def layouts_of(setting):
    """The losses of two processes with whole weights, with shares of them (FSDP), and in turns."""
    kept = {layout: losses_of(begin(setting, Path("."), sharded=layout == "fsdp"))
            for layout in ("ddp", "fsdp")}
    shares = begin(setting, Path("."), sharded=True)
    found, state = losses_of(shares, STEPS // 2)
    for sharded in (False, True):
        run = begin(setting, Path("."), sharded=sharded)
        run.resume(copy.deepcopy(state))
        more, state = losses_of(run, STEPS // 4)
        found += more
    drawn = drawn_by(shares.averaged, setting)
    shares.averaged.reshard()
    share = sum(own.numel() for part in (shares.model, shares.averaged)
                for own in map(trainer.own, part.parameters()))
    kept["in turns"] = found, state
    return {**kept, "share": share / 2 / sum(p.numel() for p in shares.parameters),
            "drawn": drawn, "ema": shares.state()["ema"]}


def drawn_by(model, setting):
    """What a model makes of prompts, its loss on a batch, and then how much of its blocks is here.
    """
    torch.manual_seed(0)
    tokens, latents = model.generate(small.prompts(setting, small.CROSSING), 60, 2)
    with torch.no_grad():
        loss = model.loss(small.pack(setting))[0]
    return tokens, latents, loss, sum(trainer.own(p).numel() for p in model.blocks.parameters())


def codebook_of(batches, seed):
    """The state of a codebook that has seen these batches; `seed`: of the codes that restart."""
    torch.manual_seed(0)
    model = vqvae.VQVAE(vqvae.VQVAEConfig(**PICTURES))
    torch.manual_seed(seed)
    for batch in batches:
        model.loss(batch)
    return model.bottleneck.state_dict()


def main():
    """What each of two processes does in the tests below."""
    torch.distributed.init_process_group()
    rank = torch.distributed.get_rank()
    kept = {setting: layouts_of(setting) for setting in small.SETTINGS}
    batches = torch.load("pictures.pt")
    kept["codebook"] = codebook_of([batch.chunk(2)[rank] for batch in batches], rank)
    torch.save(kept, f"kept-{rank}.pt")
    torch.distributed.destroy_process_group()


def begin_commands(background, place):
    for name, command in COMMANDS.items():
        (place / name).mkdir()
        torch.save(pictures(), place / name / "pictures.pt")
        write_folder(place / name / "pictures", 12)
        background.begin(name, place / name, [*TOGETHER, *command])


BEGIN = {"ended": begin_commands}


@pytest.fixture(scope="module")
def ended(background):
    """By name, where a command of two processes ran, its exit code, and what it wrote."""
    return {name: background.end(name) for name in COMMANDS}


def pictures():
    return torch.rand(4, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def two(ended):
    """What two processes found."""
    place, code, _, errors = ended["two"]
    assert code == 0, errors
    return [torch.load(place / f"kept-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "in turns"])
@pytest.mark.parametrize("setting", small.SETTINGS)
def test_two_processes_have_the_losses_and_weights_of_one(two, setting, layout, tmp_path,
                                                          monkeypatch):
    monkeypatch.setattr(trainer, "precision", trainer.precision)        # put back afterwards
    monkeypatch.setattr(muon, "fast_bf16", muon.fast_bf16)
    expected, state = losses_of(begin(setting, tmp_path, accumulate=2))
    assert len(set(expected)) == STEPS and expected[-1] < expected[0]
    for losses, found in (kept[setting][layout] for kept in two):
        assert losses == pytest.approx(expected, abs=1e-4)
        for part in ("model", "ema"):
            for name, weight in state[part].items():
                torch.testing.assert_close(found[part][name], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", small.SETTINGS)
def test_with_fsdp_each_process_holds_a_share_and_together_they_sample_as_one(two, setting):
    kept = [part[setting] for part in two]
    assert sum(part["share"] for part in kept) == pytest.approx(1)
    assert max(part["share"] for part in kept) < 0.6
    with mock.patch.dict(small.SIZE, depth=1):
        model = small.untrained(setting, (0, 1, 2, 3))
    model.load_state_dict(kept[0]["ema"])
    tokens, latents, loss, in_blocks = drawn_by(model.eval(), setting)
    assert sum(part["drawn"][3] for part in kept) == in_blocks      # after they sampled
    for part in kept:
        assert torch.equal(part["drawn"][0], tokens)
        torch.testing.assert_close(part["drawn"][1:3], (latents, loss))


def test_two_processes_have_one_codebook_of_all_their_pictures(two):
    one, other = (part["codebook"] for part in two)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(one["codebook"].unique(dim=0)) > 8
    # the first process's half places the codes; from then on every sum is over all pictures
    torch.manual_seed(0)
    model = vqvae.VQVAE(vqvae.VQVAEConfig(**PICTURES))
    with torch.no_grad():
        z_e = [model.encoder(batch).permute(0, 2, 3, 1).flatten(0, 2) for batch in pictures()]
    torch.manual_seed(0)
    state = model.bottleneck
    state.revive(z_e[0][:len(z_e[0]) // 2])
    for z in z_e:
        state.update(z, vqvae.quantize(z, state.codebook)[0])
    for name, value in state.state_dict().items():
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_run_of_two_processes_is_written_once_and_goes_on_in_one(
        ended, name, monkeypatch, plain):                                   # noqa: F811
    place, code, said, errors = ended[name]
    assert code == 0, errors
    assert said.count("see run/") == 1
    monkeypatch.chdir(place)
    call(train.main, *TRAIN[2:], "--steps", 3, "--batch-size", 8, "--accumulate", 2, "--resume")
    rows = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 3]


def test_a_batch_that_does_not_split_is_named(ended):
    _, code, _, errors = ended["does not split"]
    assert code != 0 and "error: --batch-size 7 does not split" in errors
    assert "train.py\", line" not in errors


if __name__ == "__main__":
    main()
