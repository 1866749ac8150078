"""One training step of Transfusion here beside one of transfusion-pytorch, on the same documents.

    pip install transfusion-pytorch
    python docs/alternatives.py         a minute; prints ms a step of each, measured in turns

Same width, depth, heads, documents and optimizer. transfusion-pytorch (github.com/lucidrains) takes
lists of segments and packs them in each step; its blocks have more weights than ours, gates and a
norm that knows the time among them. So the ratio is what a user waits for, not the worth of a line.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import in_turns  # noqa: E402 (the repository is not installed)
from corpora import toy_corpus  # noqa: E402
from data import Batches, Tokenizer  # noqa: E402
from machine import compiler_exists, precision  # noqa: E402
from transfusion import Transfusion, TransfusionConfig, patchify  # noqa: E402

CPU, SHAPE, ROWS, LENGTH = torch.device("cpu"), (6, 8, 8), 20, 96      # of `train.py transfusion`


def a_batch():
    """A packed batch of the shapes world, with latents drawn at random, and its layout."""
    corpus = toy_corpus("shapes", np.random.default_rng(0), 2000)
    tokenizer = Tokenizer.train(corpus.texts())
    layout = tokenizer.layout({"image": SHAPE}, {})
    latents = torch.randn(len(corpus.signals["image"]), *SHAPE)
    return next(Batches(corpus, tokenizer, layout, {"image": latents}, [0, 16, 0, 0], ROWS,
                        LENGTH)), layout


def as_segments(batch, layout):
    """The documents of a batch as lists of text ids (n,) and patches (16, P)."""
    patches = patchify(batch.signals[1], 2).flatten(0, 1)
    place = torch.zeros(batch.tokens.numel(), dtype=torch.int64)
    place[batch.order[batch.sizes[0]:]] = torch.arange(batch.sizes[1])
    documents = []
    for row, (document, span) in enumerate(zip(batch.document, batch.span)):
        for number in range(1, int(document.max()) + 1):
            at = (document == number).nonzero()[:, 0]
            cuts = (span[at].diff() != 0).nonzero()[:, 0] + 1
            parts = at.tensor_split(cuts)
            documents.append([patches[place[row * LENGTH + part]] if span[part[0]]
                              else batch.tokens[row, part] for part in parts])
    return documents


def step_of(model, loss):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with precision(CPU):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    step()
    return step


def main():
    try:
        import transfusion_pytorch
    except ImportError:
        sys.exit("error: transfusion-pytorch is missing; pip install transfusion-pytorch")
    batch, layout = a_batch()
    documents, config = as_segments(batch, layout), TransfusionConfig()
    ours = Transfusion(config, layout)
    other = transfusion_pytorch.Transfusion(
        num_text_tokens=layout.size, dim_latent=patchify(batch.signals[1], 2).shape[-1],
        modality_default_shape=(16,), transformer={
            "dim": config.width, "depth": config.depth, "heads": config.heads,
            "dim_head": config.width // config.heads})
    steps = {"ours, uncompiled": step_of(ours, lambda: ours.loss(batch)[0])}
    if compiler_exists(CPU):
        compiled = torch.compile(ours.loss, dynamic=False)
        steps["ours, compiled"] = step_of(ours, lambda: compiled(batch)[0])
    steps["transfusion-pytorch"] = step_of(other, lambda: other(documents))
    seconds = in_turns(CPU, steps, 5, each=3)
    for name, model in (("ours", ours), ("transfusion-pytorch", other)):
        print(f"{name:<24}{sum(p.numel() for p in model.parameters()):>10,} parameters")
    for name, taken in seconds.items():
        print(f"{name:<24}{1e3 * taken:10.1f} ms a step of {len(documents)} documents, "
              f"{seconds['transfusion-pytorch'] / taken:.1f} times as fast")


if __name__ == "__main__":
    main()
