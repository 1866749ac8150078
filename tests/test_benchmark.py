"""benchmark.py: it counts the right products, and what it calls uncached is the same generation."""

import importlib.util
import json

import pytest
import torch

import small
from adapter import ROOT, load
from test_command_line import SMALL, call, everything_below, folder, plain  # noqa: F401 (fixtures)

benchmark, machine, train = load("benchmark"), load("machine"), load("train")

DOCUMENTS = [[("text", "ab"), ("image", 1), ("text", "c"), ("image", None)],
             [("text", "ab"), ("audio", None)], [("image", 0), ("text", "abc"), ("video", None)]]


@pytest.mark.parametrize("towers", [None, (0, 1, 2, 3)], ids=["dense", "mot"])
@pytest.mark.parametrize("setting", small.SETTINGS)
def test_generation_without_caches_is_that_with_them(setting, towers):
    model, calls = small.model(setting, towers), []
    settings = {"code_temperature": 0} if setting == "chameleon" else {"steps": 3}
    for document in DOCUMENTS:
        found = []
        for uncached in (False, True):
            if uncached:
                model.forward = benchmark.Uncached(model)
                plain = model.forward.forward
                model.forward.forward = lambda batch, *rest, plain=plain: (
                    calls.append((batch.tokens.shape[1], rest)) or plain(batch, *rest))
            torch.manual_seed(0)
            found.append(model.generate(small.prompts(setting, [document]), 60, 2, **settings))
        del model.forward
        (tokens, latents), (others, more) = found
        assert torch.equal(tokens, others) and (tokens != model.layout.pad).any()
        for x, y in zip(latents, more):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    lengths = [length for length, _ in calls]
    assert max(lengths) > 50 and min(lengths) < 3           # it did go through whole rows
    assert len(calls[0][1]) == (setting == "transfusion")   # times, but never a cache


def test_products_are_counted_with_those_of_the_gradient():
    layer = torch.nn.Linear(5, 7, bias=False)
    with benchmark.Products() as products:
        for _ in range(2):
            layer(torch.randn(3, 5, requires_grad=True)).sum().backward()
    assert products.shapes == {(3, 5, 7): 2, (7, 3, 5): 2, (3, 7, 5): 2}


def test_peaks_are_those_of_the_products_weighted_by_their_number(monkeypatch):
    seconds = {(4, 4, 4): 1.0, (8, 8, 8): 2.0}
    shapes = {(4, 4, 4): 3, (8, 8, 8): 1}

    def timed(device, run):
        m, n = run().shape
        return seconds[m, 4 if m == 4 else 8, n]
    monkeypatch.setattr(benchmark, "timed", timed)
    work = 3 * 2 * 4 ** 3 + 2 * 8 ** 3
    assert benchmark.matmul_peak(shapes, torch.device("cpu")) == {"fp32": work / 5,
                                                                  "bf16": work / 5}


def test_what_is_compared_takes_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert benchmark.in_turns(torch.device("cpu"), runs, 2, each=3).keys() == {"a", "b"}
    assert order == list("aaabbb" * 2)


@pytest.mark.parametrize("argv", [["mot"], ["chameleon"]])
def test_a_benchmark_is_written_and_nothing_is_trained(folder, capsys, monkeypatch,  # noqa: F811
                                                       argv):
    monkeypatch.setattr(benchmark, "PICTURES", 2)
    before = everything_below(".")
    call(train.main, *argv, "--benchmark", "--data", folder, "--out", "run", "--batch-size", 4,
         *SMALL)
    (path,) = set(everything_below(".")) - set(before)
    assert str(path) == "run/benchmark.json"
    found, setting = json.loads(path.read_text()), argv[0].replace("mot", "transfusion")
    assert list(found["steps"]) == [setting, "mot"]
    dense, mot = found["steps"].values()
    assert dense["flops_per_step"] == mot["flops_per_step"] > 0
    for row in (dense, mot):
        assert row["flops_per_second"] == pytest.approx(
            row["flops_per_step"] / row["ms_per_step"] * 1e3)
        assert 0 < row["data_share"] and 0 < row["share_of_peak"] < 1
        peak = found["matmul_peak"]["bf16" if found["bf16"] else "fp32"]
        assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / peak)
    assert list(found["sampling"]) == list(found["cached_speedup"]) == ["pictures", "words"]
    for what, seconds in found["sampling"].items():
        assert list(seconds) == [setting, "mot", "without caches"]
        cached, _, uncached = seconds.values()
        assert found["cached_speedup"][what] == pytest.approx(uncached / cached)
    assert "of the peak" in capsys.readouterr().out


def test_precision_is_reported_as_it_is(monkeypatch):
    for fast in (False, True):
        monkeypatch.setitem(machine.FAST_BF16, "cpu", fast)
        with machine.precision(torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") is machine.fast_bf16(torch.device("cpu"))
            assert torch.is_autocast_enabled("cpu") is fast


def test_the_documents_given_to_another_implementation_are_those_of_the_batch():
    spec = importlib.util.spec_from_file_location("alternatives", ROOT / "docs" / "alternatives.py")
    alternatives = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alternatives)
    batch, layout = alternatives.a_batch()
    documents = alternatives.as_segments(batch, layout)
    assert len(documents) == batch.document.amax(1).sum()
    text = batch.tokens[(batch.modality == 0) & (batch.document > 0)]
    assert torch.equal(torch.cat([part for document in documents for part in document
                                  if part.dtype == torch.int64]), text)
    patches = [part for document in documents for part in document if part.is_floating_point()]
    expected = load("transfusion").patchify(batch.signals[1][batch.real[1] > 0], 2)
    assert torch.equal(torch.stack(patches), expected)
    for document in documents:
        assert document[0][0] == layout.bos and document[-1][-1] == layout.eos
