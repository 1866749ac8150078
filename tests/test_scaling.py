"""docs/scaling.py: its formulas against real models, and its page against its formulas."""

import importlib.util
import re

import pytest
import torch

from adapter import ROOT, load

machine, transfusion = load("machine"), load("transfusion")
mot, data = load("mot"), load("data")

spec = importlib.util.spec_from_file_location("scaling", ROOT / "docs" / "scaling.py")
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_page_has_the_plan_that_the_formulas_give():
    assert scaling.plan() in PAGE and scaling.published() in PAGE


def test_the_page_has_the_exponents_that_were_measured():
    import json
    found = scaling.exponents(json.loads((ROOT / "docs" / "scaling.json").read_text()))
    rows = dict(re.findall(r"^\| (.+?) \| (-?[\d.]+ \| -?[\d.]+) \|", PAGE, re.M))
    for axis, slopes in found.items():
        assert rows[scaling.CALLED[axis]] == " | ".join(f"{slope:.2f}" for slope in slopes)


@pytest.mark.parametrize("M", [1, 2, 4])
def test_parameters_are_those_of_a_model(M):
    """Of two widths, so that what is neither D^2 nor V D (patches, time, norms) stays small."""
    layout = data.Tokenizer().layout({name: (4, 8, 8) for name in data.MODALITIES[1:M]}, {})
    D, L = 768, 14
    config = transfusion.TransfusionConfig(width=D, depth=L, heads=12, hidden=8 * D // 3)
    with torch.device("meta"):
        model = mot.MoTTransfusion(config, layout)
    count = sum(p.numel() for p in model.parameters())
    others = 2 * (scaling.VOCABULARY - layout.size) * D
    assert count + others == pytest.approx(scaling.parameters(D, L, M), rel=0.02)


def test_flops_are_those_that_are_counted(monkeypatch):
    D, L = 192, 3
    monkeypatch.setattr(scaling, "LENGTH", 256)
    model, batch = scaling.case(width=D, depth=L, length=256, rows=2, modalities=1)
    monkeypatch.setattr(scaling, "VOCABULARY", model.layout.size)
    with machine.count_flops() as counter:
        model.loss(batch)[0].backward()
    # hidden is 11 D / 4 here, 8 D / 3 in the formula; the gradient of attention computes it again
    assert counter.get_total_flops() / 512 == pytest.approx(scaling.flops_per_token(D, L), rel=0.1)


def test_what_a_step_keeps_grows_with_the_batch_and_not_with_the_towers():
    kept = {}
    for rows in (2, 4, 8):
        for M in (2, 4):
            case = scaling.case(width=64, depth=2, length=192, rows=rows, modalities=M)
            kept[rows, M] = scaling.kept_for_backward(*case)
    for M in (2, 4):
        assert (kept[8, M] - kept[4, M]) / (kept[4, M] - kept[2, M]) == pytest.approx(2, rel=0.05)
    assert kept[8, 4] == pytest.approx(kept[8, 2], rel=0.1)


def test_the_bytes_of_an_activation_are_those_that_are_kept():
    D, tokens = 256, 4 * 384
    shallow, deep = (scaling.kept_for_backward(*scaling.case(D, L, 384, 4, 2)) for L in (2, 4))
    expected = scaling.ACTIVATION * D * tokens * 2
    if machine.fast_bf16(torch.device("cpu")):
        assert deep - shallow == pytest.approx(expected, rel=0.15)
    else:                               # fp32 keeps more, less than twice as much
        assert expected < deep - shallow < 2 * expected


def test_a_power_law_is_found():
    xs = [1, 2, 4, 8]
    assert scaling.exponent(xs, [3 * x ** 1.5 for x in xs]) == pytest.approx(1.5)
