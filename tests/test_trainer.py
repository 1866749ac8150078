"""trainer.py: its schedule, that runs repeat and go on, and what it survives."""

import contextlib
import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import small
from adapter import ROOT, load

data, machine, sample, train = load("data"), load("machine"), load("sample"), load("train")
trainer, checkpoints = load("trainer"), load("checkpoints")


def small_trainer(setting, tmp_path, seed, towers=(0, 1, 2, 3), optimizer="adamw", **options):
    """A trainer of a small model on six pictures and sounds."""
    documents = [[("text", word), ("image", n)]
                 for n, word in enumerate(("red", "or", "green", "or", "blue", "x"))]
    batches = data.Batches(data.Corpus(documents, {}), small.TOKENIZER, small.LAYOUT[setting],
                           small.signals(setting), small.POSITIONS, rows=4, length=32)
    config = train.TrainConfig(steps=8, lr=1e-2, optimizer=optimizer, warmup=2, weight_decay=0.01,
                               ema=0.9)
    torch.manual_seed(seed)
    return trainer.Trainer(small.randomise(small.untrained(setting, towers), seed), batches, config,
                           torch.device("cpu"), tmp_path, compiled=False, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("towers", [None, (0, 1, 2, 3)], ids=["dense", "mot"])
@pytest.mark.parametrize("setting", small.SETTINGS)
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
        setting, towers, optimizer, tmp_path):
    def begin(seed):
        run = small_trainer(setting, tmp_path, seed, towers, optimizer)
        run.model.train()           # with noise on codes
        return run
    straight = begin(seed=0)
    expected = [straight.train_step()["loss"] for _ in range(8)]
    stopped = begin(seed=0)
    found = [stopped.train_step()["loss"] for _ in range(4)]
    torch.save(stopped.state(), tmp_path / "checkpoint.pt")
    resumed = begin(seed=1)
    resumed.resume(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    found += [resumed.train_step()["loss"] for _ in range(4)]
    assert found == expected and len(set(expected)) == 8
    for part in ("model", "averaged"):
        one, other = (getattr(t, part).state_dict() for t in (straight, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth(tmp_path):
    rates, run = [], small_trainer("transfusion", tmp_path, seed=0)
    run.config = train.TrainConfig(steps=100, lr=2.0, warmup=10)
    for run.step in range(101):
        rates.append(run.learning_rate())
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0.02)
    assert rates[55] == pytest.approx(2 * 0.505) and rates[10:] == sorted(rates[10:], reverse=True)


def check_compiled():
    """What the next test is about, in a process of its own: it takes long."""
    trainer.precision = lambda device: contextlib.nullcontext()                 # fp32
    small.SIZE["depth"] = 1                             # each more takes as long to compile
    plain, compiled = (small_trainer("chameleon", Path("."), 0, (0, 1, 1, 1)) for _ in range(2))
    compiled.compiled = True            # in evaluation, as here, Chameleon's loss has no chance
    compiled.config = plain.config = dataclasses.replace(plain.config, steps=trainer.PAYS)
    state = copy.deepcopy(compiled.batches.state)
    compiled.compile()
    assert compiled.loss is not compiled.model.loss and plain.loss == plain.model.loss
    assert compiled.batches.state == state
    assert all(p.grad is None for p in compiled.parameters)
    for _ in range(3):
        found, expected = compiled.train_step(), plain.train_step()
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)


def begin_compiled(background, place):
    background.begin("compiled", place, [sys.executable, __file__])


BEGIN = {"compiled": begin_compiled}


@pytest.fixture
def compiled(background):
    return background.end("compiled")


@pytest.mark.skipif(not machine.compiler_exists(torch.device("cpu")), reason="no compiler")
def test_compiled_training_is_that_of_the_plain_code_and_compiling_leaves_no_trace(compiled):
    _, code, said, errors = compiled
    assert code == 0, errors
    assert re.search("compiled in [0-9]+ s", said)


def test_a_short_run_is_not_compiled(tmp_path):
    run = small_trainer("transfusion", tmp_path, seed=0)
    run.compiled = True
    run.compile()
    assert run.loss == run.model.loss


def test_what_no_step_had_is_left_out_of_the_mean_of_several():
    rows = [{"loss": torch.tensor(x), "image_noise_0": torch.tensor(y), "image_noise_1": nan}
            for nan in [torch.tensor(math.nan)] for x, y in ((1.0, math.nan), (3.0, 0.5))]
    rows.append({"loss": torch.tensor(5.0)})
    expected = {"loss": 3.0, "image_noise_0": 0.5, "image_noise_1": None}
    assert trainer.as_numbers(trainer.merged(rows)) == expected
    assert trainer.as_numbers(trainer.merged(rows[:1])) == {**expected, "loss": 1.0,
                                                            "image_noise_0": None}


# --- a batch in parts ----------------------------------------------------------------------------

def gradients(model, batches, totals=None):
    """The loss of batches, added up, and its gradient by parameter."""
    model.zero_grad()
    losses = [model.loss(batch, totals)[0] for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {name: p.grad for name, p in model.named_parameters()}


def same_gradients(model, whole, parts):
    expected, gradient = gradients(model, [whole])
    found, other = gradients(model, parts, sum(map(model.totals, parts)))
    torch.testing.assert_close(found, expected)
    for name in gradient:
        torch.testing.assert_close(other[name], gradient[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("towers", [None, (0, 1, 2, 3)])
@pytest.mark.parametrize("setting", small.SETTINGS)
def test_the_parts_of_a_batch_have_its_loss_and_gradient_however_unlike_they_are(
        monkeypatch, setting, towers):
    model = small.randomise(small.untrained(setting, towers)).eval()    # no noise of codes
    monkeypatch.setattr(torch, "randn_like", lambda x: x.flip(-1).sin())            # a span's own
    transfusion = load("transfusion")
    monkeypatch.setattr(transfusion, "sample_times", lambda count, *_: torch.full((count,), 0.7))
    parts = [small.pack(setting, [row], spans)
             for row, spans in zip(small.ROWS, ([0, 3, 1, 1], [0, 2, 1, 2]))]
    assert model.totals(parts[0]).tolist() != model.totals(parts[1]).tolist()
    same_gradients(model, small.pack(setting), parts)


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_the_parts_of_a_batch_of_pictures_have_its_loss_and_gradient(monkeypatch, bottleneck):
    vqvae = load("vqvae")
    torch.manual_seed(0)
    config = vqvae.VQVAEConfig(bottleneck=bottleneck, size=(16, 16), widths=(8, 16))
    model, pictures = vqvae.VQVAE(config), torch.rand(8, 3, 16, 16) * 2 - 1
    model.loss(pictures)                                    # places the codes
    model.eval()
    monkeypatch.setattr(torch, "randn_like", lambda x: x.detach().sin())
    same_gradients(model, pictures, pictures.split([3, 5]))


@pytest.mark.parametrize("setting", small.SETTINGS)
def test_a_step_in_parts_adds_their_gradients_and_goes_on_exactly(
        setting, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "precision", lambda device: contextlib.nullcontext())     # fp32
    run = small_trainer(setting, tmp_path, seed=0)
    run.config = dataclasses.replace(run.config, accumulate=2)
    parts = [next(run.batches) for _ in range(2)]
    run.batches.state = run.batches.start()
    totals, losses = sum(map(run.model.totals, parts)), []
    for number, part in enumerate(parts):
        trainer.seed_everything(0, 0, number)
        losses.append(run.model.loss(part, totals)[0])
    sum(losses).backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in run.parameters if p.grad is not None])
    run.model.zero_grad()
    found = run.train_step()
    torch.testing.assert_close(found["loss"], sum(losses).detach())
    torch.testing.assert_close(found["gradient_norm"], norm)
    assert run.batches.state["batch"] == 2
    saved = copy.deepcopy(run.state())
    expected = [run.train_step()["loss"] for _ in range(3)]
    again = small_trainer(setting, tmp_path, seed=1)
    again.config = run.config
    again.resume(saved)
    assert [again.train_step()["loss"] for _ in range(3)] == expected


# --- faults --------------------------------------------------------------------------------------

def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_changes_no_weight_and_is_explained(
        tmp_path, where, optimizer):
    run, before = small_trainer("transfusion", tmp_path, seed=0, optimizer=optimizer), []

    def broken(batch, totals):
        loss, parts = run.model.loss(batch, totals)
        before.append(weights(run))
        if len(before) == 3:            # steps before and after are sound
            loss = loss * (math.inf if where == "loss" else 1.0)
            if where == "gradient":
                loss.register_hook(lambda grad: grad * math.nan)
        return loss, parts
    run.loss = broken
    with pytest.raises(data.InputError) as stopped:
        run.train("a run", lambda: pytest.fail("a broken state was saved"))
    assert len(before) == 8             # found when the log is written, at the last of eight steps
    for name, value in weights(run).items():
        assert torch.equal(value, before[2][name])
        assert value.isfinite().all()
    assert any(not torch.equal(before[1][name], before[2][name]) for name in before[1])
    sentence = str(stopped.value)
    assert "at step 3 " in sentence and "learning rate 0.0" in sentence and "image" in sentence
    assert ("the loss is inf" if where == "loss" else "gradient_norm nan") in sentence


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_and_the_run_goes_on_as_if_it_never_came(
        tmp_path, number):
    straight = small_trainer("transfusion", tmp_path, seed=0)
    straight.train("a run", lambda: None)
    expected = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("")
    run, saved, handlers = small_trainer("transfusion", tmp_path, seed=0), [], signal.getsignal(
        number)
    step = run.train_step

    def signalled():
        if run.step == 4:
            os.kill(os.getpid(), number)
        return step()
    run.train_step = signalled
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5; .* --resume"):
        run.train("a run", lambda: saved.append(copy.deepcopy(run.state())))
    assert [state["step"] for state in saved] == [5] and signal.getsignal(number) == handlers
    again = small_trainer("transfusion", tmp_path, seed=1)
    again.resume(saved[0])
    again.train("a run", lambda: None)
    for part in ("model", "averaged"):
        one, other = (getattr(t, part).state_dict() for t in (straight, again))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads(expected[-1])["lr"] == again.learning_rate()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_term_that_is_not_finite_is_named(tmp_path, accumulate):
    run = small_trainer("chameleon", tmp_path, seed=0)
    run.config = dataclasses.replace(run.config, accumulate=accumulate)
    calls = itertools.count()

    def broken(batch, totals):
        loss, parts = run.model.loss(batch, totals)
        if next(calls):                 # the first part alone is broken
            return loss, {**parts, "image_noise_0": torch.tensor(0.5)}
        return loss + math.nan, {**parts, "log_z_squared": torch.tensor(math.nan),
                                 "image_noise_0": torch.tensor(math.nan)}
    run.loss = broken
    with pytest.raises(data.InputError) as stopped:
        run.train("a run", lambda: None)
    assert "(log_z_squared nan" in str(stopped.value) and "noise" not in str(stopped.value)


def test_a_log_whose_last_row_is_torn_is_gone_on_with(tmp_path):
    run = small_trainer("transfusion", tmp_path, seed=0)
    run.step = 3
    state, log = run.state(), tmp_path / "metrics.jsonl"
    log.write_text('{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    run.resume(state)
    assert log.read_text() == '{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 0.5}\n'


def test_a_second_signal_stops_at_once(tmp_path):
    run = small_trainer("transfusion", tmp_path, seed=0)

    def stuck():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    run.train_step = stuck
    with pytest.raises(KeyboardInterrupt, match="at once"):
        run.train("a run", lambda: pytest.fail("in the middle of a step"))


def test_it_saves_every_so_many_steps_and_at_the_end(tmp_path):
    run, saved = small_trainer("chameleon", tmp_path, seed=0), []
    run.config = dataclasses.replace(run.config, save_every=3)
    run.train("a run", lambda: saved.append(run.step))
    assert saved == [3, 6, 8]


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a disk that is full: no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint_whole(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"weights": torch.arange(5)})
    old = path.read_bytes()
    with files_of_at_most(100_000), pytest.raises(data.InputError) as stopped:
        checkpoints.save_checkpoint(path, {"weights": torch.zeros(1_000_000)})
    assert "checkpoint.pt" in str(stopped.value) and "--resume" in str(stopped.value)
    assert path.read_bytes() == old and [*tmp_path.iterdir()] == [path]
    checkpoints.save_checkpoint(path, {"weights": torch.zeros(1_000_000)})       # with room again
    assert torch.load(path, weights_only=True)["weights"].shape == (1_000_000,)


def test_a_log_that_cannot_grow_is_one_sentence(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    with pytest.raises(SystemExit) as stopped:
        sample.run(full)
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence.count("\n") == 1 and "metrics.jsonl" in sentence


SAVES = """
import sys, torch
sys.path.insert(0, {root!r} + "/tests")
from pathlib import Path
from adapter import load
save_checkpoint = load("checkpoints").save_checkpoint
print("ready", flush=True)
for number in range(10 ** 9):
    save_checkpoint(Path("checkpoint.pt"), {{"number": torch.full((200_000,), number)}})
    print(number, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    chance = random.Random(0)
    for _ in range(3):                  # tests/kill.py kills whole runs, at 30 moments
        process = subprocess.Popen([sys.executable, "-c", SAVES.format(root=str(ROOT))],
                                   cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n" and process.stdout.readline() == "0\n"
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        last = (process.communicate()[0].split() or ["0"])[-1]
        kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["number"]
        assert kept.eq(kept[0]).all() and int(last) <= kept[0] <= int(last) + 1


if __name__ == "__main__":
    check_compiled()
