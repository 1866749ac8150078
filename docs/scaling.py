"""How cost grows: measured on this machine, and planned past it. It makes the tables and the figure
of docs/scaling.md.

    python docs/scaling.py plan         the plans, in Markdown: arithmetic alone
    python docs/scaling.py measure      some minutes; writes docs/scaling.json and docs/scaling.png
    python docs/scaling.py figure       docs/scaling.png again, and the fitted exponents
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmark import in_turns  # noqa: E402 (the repository is not installed)
from data import MODALITIES, Tokenizer, pack, tokenize  # noqa: E402
from machine import precision  # noqa: E402
from mot import MoTTransfusion  # noqa: E402
from transfusion import TransfusionConfig  # noqa: E402

# --- plans ---------------------------------------------------------------------------------------

VOCABULARY, LENGTH = 65_536, 4096           # V and T of Chameleon and MoT
MODELS = {"100M": (768, 14), "1B": (2048, 20), "7B": (4096, 32)}        # D, L
PEAK, SHARE = 312e12, 0.40                  # FLOP/s of an A100 in bf16; what a good run gets of it
# published runs: name, D, L, parameters that multiply a token (0: by the formula), tokens in 10^12,
# GPU hours; the 34B has grouped queries, so fewer parameters than the formula says
RUNS = (("Chameleon 7B (D 4096, L 32)", 4096, 32, 0, 9.2, "856,481 (1,024 A100)"),
        ("Chameleon 34B (D 8192, L 48)", 8192, 48, 34e9, 9.2, "4,282,407 (3,072 A100)"),
        ("Transfusion 7B", 4096, 32, 0, 0.5, "not published"),
        ("Transfusion 7.3B, final", 4096, 32, 0, 2, "not published"),
        ("MoT 7B (120,000 steps; 0.17 to 0.38 T over its sizes)", 4096, 32, 0, 0.38,
         "not published"))
STATE = 20          # bytes a parameter: weight, gradient, two moments, average, in fp32
ACTIVATION = 70     # bytes a position, layer and unit of width: what our blocks keep in bf16
GIB = 2 ** 30


def parameters(D, L, M=1):
    """All that exist: 4 D^2 in attention and 8 D^2 in the SwiGLU of each layer, for each of the M
    towers, and two embeddings."""
    return 12 * L * D * D * M + 2 * VOCABULARY * D


def flops_per_token(D, L, multiplied=0):
    """Of training: 6 for every parameter that multiplies it (by the formula, or as many as given),
    and 12 L D T for attention (no part of it skipped). M is not in it: a token meets one tower."""
    return 6 * (multiplied or 12 * L * D * D + VOCABULARY * D) + 12 * L * D * LENGTH


def memory(D, L, M, gpus, tokens=LENGTH):
    """Bytes on each GPU with fully_shard: shares of all states, the largest layer in one piece, and
    what the backward pass of `tokens` positions needs, logits (and their gradient) included."""
    layer = 12 * D * D * M * 4 * (gpus > 1)
    return (STATE * parameters(D, L, M) / gpus + layer
            + tokens * (ACTIVATION * L * D + 8 * VOCABULARY))


def tokens_per_second(D, L, gpus):
    return gpus * PEAK * SHARE / flops_per_token(D, L)


def plan():
    """-> Markdown."""
    lines = ["| model (D, L) | M | parameters, all; of one token | GFLOPs a token | GPUs | GiB on "
             "each | tokens a second |", "|" + "---|" * 7]
    for name, (D, L) in MODELS.items():
        for M in (2, 4):
            for gpus in (1, 8, 64):
                need = memory(D, L, M, gpus) / GIB
                lines.append(
                    f"| {name} ({D}, {L}) | {M} | {parameters(D, L, M) / 1e9:.2f} G; "
                    f"{parameters(D, L) / 1e9:.2f} G | {flops_per_token(D, L) / 1e9:.2f} | {gpus} "
                    f"| {need:.0f}{'' if need < 80 else ' (more than 80)'} "
                    f"| {tokens_per_second(D, L, gpus):,.0f} |")
    return "\n".join(lines)


def published():
    """The formulas beside published runs -> Markdown."""
    lines = ["| run | tokens | FLOPs a token | GPU hours by the formula | published |",
             "|" + "---|" * 5]
    for name, D, L, multiplied, tokens, hours in RUNS:
        flops = flops_per_token(D, L, multiplied)
        lines.append(f"| {name} | {tokens:g} T | {flops / 1e9:.0f} G "
                     f"| {tokens * 1e12 * flops / (PEAK * SHARE) / 3600:,.0f} | {hours} |")
    return "\n".join(lines)


# --- growth --------------------------------------------------------------------------------------

BASE = {"width": 128, "depth": 4, "length": 192, "rows": 8, "modalities": 2}
AXES = {"width": (64, 128, 256, 512), "depth": (2, 4, 8, 16), "length": (96, 192, 384, 768, 1536),
        "rows": (4, 8, 16, 32), "modalities": (1, 2, 3, 4)}
CALLED = {"width": "width D", "depth": "depth", "length": "positions of a row T",
          "rows": "rows of a batch B", "modalities": "modalities (towers) M"}


def case(width, depth, length, rows, modalities):
    """MoT (Transfusion) and a batch of which each modality has its share of the positions."""
    names, tokenizer = MODALITIES[1:modalities], Tokenizer()
    layout = tokenizer.layout({name: (6, 8, 8) for name in names}, {})
    spans = length // modalities // 18
    words = length - 2 - 18 * spans * len(names)
    document = [("text", "a" * words)] + [(name, 0) for name in names] * spans
    latents = {name: torch.randn(1, 6, 8, 8) for name in names}
    batch = pack([[tokenize(document, tokenizer)]] * rows, length, layout,
                 [0] + [16 * (name in names) for name in MODALITIES[1:]], latents)
    torch.manual_seed(0)
    config = TransfusionConfig(width=width, depth=depth, heads=width // 32, hidden=width * 11 // 4)
    return MoTTransfusion(config, layout), batch


def kept_for_backward(model, batch):
    """Bytes of what a loss keeps for its gradient, parameters left out."""
    ours, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def count(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(x)             # or its address would be used again
        return x
    alive = []
    with (torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
          precision(torch.device("cpu"))):
        loss = model.loss(batch)[0]
    del loss
    return sum(seen.values())


def step_of(model, batch):
    """A training step, uncompiled."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with precision(torch.device("cpu")):
            model.loss(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def measure(rounds=7):
    """Every axis by itself, around BASE -> {axis: [{its value, ms, kept, state}, ...]}."""
    found = {}
    for axis, values in AXES.items():
        cases = {value: case(**{**BASE, axis: value}) for value in values}
        seconds = in_turns(torch.device("cpu"), {value: step_of(*cases[value]) for value in values},
                           rounds)
        found[axis] = [{"value": value, "ms": 1e3 * seconds[value],
                        "kept": kept_for_backward(*cases[value]),
                        "state": 16 * sum(p.numel() for p in cases[value][0].parameters())}
                       for value in values]
        print(axis, found[axis], flush=True)
    return found


def exponent(xs, ys):
    """The slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def exponents(found):
    """{axis: (of ms, of what is kept for the backward pass)}, without the smallest of its values,
    where what grows has not yet outgrown what does not; of towers, over all."""
    table = {}
    for axis, rows in found.items():
        upper = rows if axis == "modalities" else rows[1:]
        xs = [row["value"] for row in upper]
        table[axis] = [exponent(xs, [row[name] for row in upper]) for name in ("ms", "kept")]
    return table


def figure(found, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot
    picture, axes = pyplot.subplots(2, len(found), figsize=(3.1 * len(found), 5.4),
                                    layout="constrained")
    slopes = exponents(found)
    for column, (axis, rows) in zip(axes.T, found.items()):
        xs = [row["value"] for row in rows]
        for panel, name, unit, slope in zip(column, ("ms", "kept"), ("ms a step", "MiB"),
                                            slopes[axis]):
            scale = 1 if name == "ms" else 2 ** 20
            ys = [row[name] / scale for row in rows]
            panel.loglog(xs, ys, "o-", label="a step" if name == "ms" else "kept for backward")
            if name == "kept":
                panel.loglog(xs, [row["state"] / scale for row in rows], "s--", color="gray",
                             label="weights, gradient, moments")
            panel.set_title(f"exponent {slope:.2f}", fontsize=10)
            low, high = panel.get_ylim()
            spare = max(1.0, (20 * low / high) ** 0.5)      # what hardly changes shall look so
            panel.set_ylim(low / spare, high * spare)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xticks(xs, [str(x) for x in xs])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
            panel.set_ylabel(unit)
        column[1].set_xlabel(CALLED[axis])
    picture.suptitle("MoT in Transfusion, one step: what it costs, along one size at a time "
                     f"(else D {BASE['width']}, depth {BASE['depth']}, T {BASE['length']}, "
                     f"B {BASE['rows']}, M {BASE['modalities']})", fontsize=11)
    picture.savefig(out, dpi=110)


def main():
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what not in ("plan", "measure", "figure"):
        sys.exit(__doc__)
    if what == "plan":
        print(plan(), published(), sep="\n\n")
        return
    path = HERE / "scaling.json"
    if what == "measure":
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    found = json.loads(path.read_text())
    figure(found, HERE / "scaling.png")
    for axis, (time, kept) in exponents(found).items():
        print(f"{CALLED[axis]:<24}ms ~ x^{time:.2f}    kept for the backward pass ~ x^{kept:.2f}")


if __name__ == "__main__":
    main()
