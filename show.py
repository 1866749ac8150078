"""What is made for people's eyes: loss curves, sheets of samples, transcripts, tours of a model."""

import json
import textwrap

import numpy as np
import torch

from data import MODALITIES, Batches, Tokenizer, shapes_corpus, to_bytes, to_signal
from worlds import shapes

QUARTERS = ("t < 1/4 (little noise)", "1/4 to 1/2", "1/2 to 3/4", "t > 3/4 (mostly noise)")
EXPLAINED = {"text": "text: cross-entropy, nats per token",
             "reconstruction": "reconstruction: mean squared error",
             "kl": "KL, nats per latent element",
             "commitment": "commitment: squared distance to the code",
             "log_z_squared": "(log Z)^2, held down by the z-loss"}


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot
    return pyplot


def curves(metrics_path, out, title):
    """metrics.jsonl -> a picture of all losses: one panel a quantity, noise levels together."""
    rows = [json.loads(line) for line in open(metrics_path, encoding="utf-8")]
    noise = [name for name in rows[-1] if "_noise_" in name]
    single = [name for name in rows[-1] if name not in noise
              and name not in ("step", "loss", "lr", "gradient_norm", "seconds", "text_accuracy")]
    explained = EXPLAINED | {"image": "image: squared error of the velocity" if noise
                             else "image: cross-entropy, nats per code"}
    panels = [[name] for name in single] + ([noise] if noise else [])
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, names in zip(axes[0], panels):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot([step for step, _ in points], [value for _, value in points],
                      label=QUARTERS[int(name[-1])] if names is noise else name)
        axis.set_title("image: diffusion loss by noise level" if names is noise
                       else explained.get(names[0], names[0]), fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log" if all(value > 0 for line in axis.lines for value in line.get_ydata())
                        else "linear")
        axis.grid(alpha=0.3)
        if names is noise:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _picture(axis, picture, title=""):
    axis.imshow(to_bytes(picture).transpose(1, 2, 0), interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _say(axis, text, colour="black"):
    axis.axis("off")
    axis.text(0, 0.5, textwrap.fill(text, 34), fontsize=8, va="center", color=colour,
              transform=axis.transAxes)


def verdict(scene, wanted):
    """What the grader read, and the colour to print it in."""
    if scene == wanted:
        return "right: " + shapes.describe(scene), "green"
    return ("unreadable" if scene is None else "wrong: " + shapes.describe(scene)), "firebrick"


def sheet(system, out, title, corpus=None, count=8, seed=7):
    """prompt, true and generated picture, what the grader reads; then picture and its caption."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    if corpus is None:
        scenes = [shapes.sample(rng, things=1 + i % 2, held_out=i >= count - 2)
                  for i in range(count)]
        texts = [shapes.describe(scene, rng) for scene in scenes]
        true = torch.from_numpy(np.stack([shapes.render(scene, rng, system.picture_size)
                                          for scene in scenes]))
    else:
        pairs = [document for document in corpus.documents[:count]]
        texts, scenes = [pair[0][1] for pair in pairs], None
        true = torch.from_numpy(corpus.signals["image"][[pair[1][1] for pair in pairs]]) / 127.5 - 1
    drawn, written = system.draw(texts), system.caption(true)
    pyplot = _pyplot()
    widths = [2.6, 1, 1, 2.6, 0.3, 1, 2.6]
    figure, axes = pyplot.subplots(len(texts), 7, figsize=(13, 1.25 * len(texts) + 0.8),
                                   gridspec_kw={"width_ratios": widths}, squeeze=False)
    for i, (row, text) in enumerate(zip(axes, texts)):
        held_out = scenes is not None and shapes.is_held_out(scenes[i])
        _say(row[0], ("[unseen pair] " if held_out else "") + text)
        _picture(row[1], true[i], "a true picture" if i == 0 else "")
        _picture(row[2], drawn[i], "generated" if i == 0 else "")
        if scenes is None:
            _say(row[3], ""), _say(row[6], written[i], "green" if written[i] == text else "black")
        else:
            _say(row[3], *verdict(shapes.grade(drawn[i].numpy()), scenes[i]))
            _say(row[6], written[i], verdict(shapes.parse(written[i]), scenes[i])[1])
        row[4].axis("off")
        _picture(row[5], true[i], "a picture" if i == 0 else "")
    if len(texts):
        axes[0][0].set_title("prompt", fontsize=8)
        axes[0][3].set_title("what the grader reads" if scenes else "", fontsize=8)
        axes[0][6].set_title("its generated caption", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def reconstructions(pictures, rebuilt, out, title):
    """Pictures above, what the autoencoder makes of them below."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, len(pictures), figsize=(1.2 * len(pictures), 3),
                                   squeeze=False)
    for k, (above, below) in enumerate(zip(pictures, rebuilt)):
        _picture(axes[0][k], above, "true" if k == 0 else "")
        _picture(axes[1][k], below, "rebuilt" if k == 0 else "")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


# --- tours: what `python mot.py` and the others print --------------------------------------------

def demo_pictures(count, seed=0):
    """`count` pictures of the shapes world, (count, 3, 32, 32) in [-1, 1]."""
    return to_signal(shapes_corpus(np.random.default_rng(seed), count).signals["image"][:count])


def demo(bottleneck):
    """A real batch of the shapes world and its layout; the autoencoder behind it is untrained."""
    from sample import layout_of
    from vqvae import VQVAE, Codec, VQVAEConfig
    torch.manual_seed(0)
    corpus = shapes_corpus(np.random.default_rng(0), 400)
    tokenizer, pictures = Tokenizer.train(corpus.texts()), to_signal(corpus.signals["image"])
    autoencoder = VQVAE(VQVAEConfig(bottleneck=bottleneck))
    with torch.no_grad():
        autoencoder.loss(pictures[:64])         # places the codes
        autoencoder.eval().fit_scale(pictures)
        encoded = {"image": autoencoder.encode(pictures)}
    layout = layout_of(tokenizer, {"image": Codec("image", autoencoder)})
    positions = [0, 16 if bottleneck == "kl" else 64, 0, 0]
    length = 96 if bottleneck == "kl" else 256
    return next(Batches(corpus, tokenizer, layout, encoded, positions, 4, length)), layout


def tour(model, batch, ids=40):
    """One real batch, taken apart in characters: sequence, mask, shapes, parameters, FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode
    layout, T = model.layout, int((batch.document[0] == 1).sum())
    names = {layout.pad: ".", layout.bos: "<bos>", layout.eos: "<eos>"}
    names |= {layout.begin[1]: "<boi>", layout.end[1]: "<eoi>"}
    print(f"batch: {tuple(batch.tokens.shape)} positions, "
          + ", ".join(f"{size} {name}" for name, size in zip(MODALITIES, batch.sizes) if size)
          + f", {float((batch.document == 0).float().mean()):.0%} padding")
    first = batch.tokens[0, :T].tolist()
    kinds = batch.modality[0, :T].tolist()
    print("\nits first document (ids; i = a latent vector stands here):")
    words = [names.get(i, str(i)) if kind == 0 else ("i" if i == layout.pad else str(i))
             for i, kind in zip(first, kinds)]
    print(textwrap.fill(" ".join(words), 96))
    print("\nwho may attend to whom in it (row: position, column: what it sees; t text, I image):")
    mask = attention_mask_of(model, batch)[0, 0, :T, :T]
    keep = slice(0, min(T, ids))
    print("     " + "".join("tIAV"[kind] for kind in kinds[keep]))
    for i in range(T)[keep]:
        print(f"{i:3d} {'tIAV'[kinds[i]]} "[:5]
              + "".join("#" if x else "." for x in mask[i, keep].tolist()))
    print("\nshapes, stage by stage:")
    trace(model, batch)
    print("\nparameters:")
    for name, count in parameters_by_part(model).items():
        print(f"  {name:<34}{count:>10,}")
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)
    forward = counter.get_total_flops()
    print(f"\nforward FLOPs per position: {forward / batch.tokens.numel():,.0f} "
          "(training: about three times)")


def attention_mask_of(model, batch):
    import inspect
    from sys import modules
    host = next(base for base in type(model).__mro__
                if hasattr(modules[base.__module__], "attention_mask"))
    mask = modules[host.__module__].attention_mask
    return mask(*(getattr(batch, name) for name in inspect.signature(mask).parameters))


def trace(model, batch):
    """Print the shape of what each part of the model returns, in the order of the computation."""
    seen, hooks = set(), []

    def report(name):
        def hook(module, inputs, output):
            shape = getattr(output, "shape", None)
            if shape is not None and name not in seen:
                seen.add(name)
                print(f"  {name:<34}{tuple(shape)}")
        return hook
    later = tuple(f"blocks.{i}" for i in range(1, 99))
    for name, module in model.named_modules():
        if name and name.count(".") <= 2 and not name.startswith(later):
            hooks.append(module.register_forward_hook(report(name)))
    with torch.no_grad():
        loss, parts = model.loss(batch)
    print(f"  {'loss (untrained)':<34}{loss.item():.3f} = "
          + ", ".join(f"{name} {value.item():.3f}" for name, value in parts.items()
                      if "noise" not in name))
    for hook in hooks:
        hook.remove()


def parameters_by_part(model):
    """Parameters by part, and by tower where a part is untied."""
    counts = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part == "blocks":
            part = "blocks, " + ("attention" if "attention." in name
                                 else "ffn" if "ffn." in name else "norms")
        if ".copies." in name:
            tower = int(name.split(".copies.")[1].split(".")[0])
            part += f", tower {tower} ({MODALITIES[tower]})"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts | {"in all": sum(counts.values())}
