"""What is made for people's eyes: loss curves, sheets of samples, tours of a model."""

import itertools
import json
import math
import re
import textwrap

import numpy as np
import torch

from corpora import WORLDS, toy_corpus
from data import MODALITIES, Batches, Tokenizer, to_bytes, to_signal
from machine import count_flops, rank
from vqvae import spectrum
from worlds import stories

QUARTERS = ("t < 1/4 (little noise)", "1/4 to 1/2", "1/2 to 3/4", "t > 3/4 (mostly noise)")
EXPLAINED = {"text": "text: cross-entropy, nats per token",
             "reconstruction": "reconstruction: mean squared error",
             "kl": "KL, nats per latent element",
             "commitment": "commitment: squared distance to the code",
             "log_z_squared": "(log Z)^2, held down by the z-loss"}
# inches: width, height
SHOWN = {"image": (1.2, 1.2), "audio": (2.4, 1.2), "video": (6.0, 0.85), "text": (0.01, 0.6)}


def _pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot
    return pyplot


def _finish(figure, out, title):
    figure.suptitle(title, fontsize=11, parse_math=False)
    if rank() == 0:
        out.parent.mkdir(exist_ok=True)
        figure.savefig(out, dpi=110)
    _pyplot().close(figure)


def curves(metrics_path, out, title):
    """metrics.jsonl -> a picture of all losses: one panel a quantity, noise levels together."""
    rows = [json.loads(line) for line in open(metrics_path, encoding="utf-8")]
    hidden = ("step", "loss", "lr", "gradient_norm", "seconds", "text_accuracy")
    if not rows:                        # stopped before the first
        return
    names = [name for name in dict.fromkeys(itertools.chain(*rows)) if name not in hidden]
    panels, explained = [[name] for name in names if "_noise_" not in name], dict(EXPLAINED)
    for kind in MODALITIES[1:]:
        levels = [name for name in names if name.startswith(f"{kind}_noise_")]
        panels += [levels] if levels else []
        explained[kind] = f"{kind}: " + ("squared error of the velocity" if levels
                                         else "cross-entropy, nats per code")
    columns = min(4, len(panels))
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(math.ceil(len(panels) / columns), columns, squeeze=False,
                                   figsize=(4.6 * columns, 3.4 * math.ceil(len(panels) / columns)),
                                   layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, names in zip(axes.flat, panels):
        levels = "_noise_" in names[0]
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot([step for step, _ in points], [value for _, value in points],
                      label=QUARTERS[int(name[-1])] if levels else name)
        axis.set_title(names[0].split("_")[0] + ": diffusion loss by noise level" if levels
                       else explained.get(names[0], names[0]), fontsize=10)
        axis.set_xlabel("step")
        axis.set_yscale("log" if all(value > 0 for line in axis.lines for value in line.get_ydata())
                        else "linear")
        axis.grid(alpha=0.3)
        if levels:
            axis.legend(fontsize=8)
    _finish(figure, out, title)


# --- sheets: signals and words side by side ------------------------------------------------------

def draw_signal(axis, name, signal, title=""):
    """A picture as it is; a sound as its waveform above its spectrum; a clip as a film strip."""
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    if name == "image":
        axis.imshow(to_bytes(signal).transpose(1, 2, 0), interpolation="nearest")
    elif name == "video":
        frames, gap = to_bytes(signal).transpose(0, 2, 3, 1), 2             # (frames, H, W, 3)
        strip = np.concatenate(np.pad(frames, ((0, 0), (gap, gap), (gap, 0), (0, 0)),
                                      constant_values=120), axis=1)
        strip = np.pad(strip, ((0, 0), (0, gap), (0, 0)), constant_values=120)
        axis.imshow(strip, interpolation="nearest")
        axis.axis("off")
    else:
        axis.axis("off")
        wave, sound = axis.inset_axes([0, 0.72, 1, 0.26]), axis.inset_axes([0, 0.02, 1, 0.66])
        wave.plot(np.asarray(signal[0]), linewidth=0.3, color="black")
        wave.set_xlim(0, signal.shape[-1])
        wave.set_ylim(-0.6, 0.6)
        picture = spectrum(torch.as_tensor(signal)[None])[0, 0].numpy()
        sound.imshow(picture, origin="lower", aspect="auto",
                     cmap="magma", vmin=-1, vmax=1, interpolation="nearest")
        for inset in (wave, sound):
            inset.set_xticks([])
            inset.set_yticks([])


def _say(axis, text, letters, colour="black"):
    axis.axis("off")
    axis.text(0, 0.5, textwrap.fill(text, letters), fontsize=8, va="center", color=colour,
              transform=axis.transAxes, parse_math=False)       # a $ is a $


def verdict(world, scene, wanted):
    """What the grader read, and the colour to print it in."""
    if scene == wanted:
        return "right: " + world.describe(scene), "green"
    return ("unreadable" if scene is None else "wrong: " + world.describe(scene)), "firebrick"


def sheet(system, out, title, corpus=None, told=False, count=8, seed=7):
    """For each modality: prompt, true and generated signal, what the grader reads in it; and the
    caption that the model writes of the true one; with `told`, stories that it continues. corpus:
    held-out files of your own, which no grader can read."""
    names = [name for name in system.codecs if corpus is None or name in corpus.signals]
    names += ["text"] * told
    count = count if len(names) == 1 else max(2, count // 2)
    torch.manual_seed(seed)
    heights = [count * SHOWN[name][1] + 0.3 for name in names]
    whole = max(2 * SHOWN[name][0] + 6.6 for name in names)                 # inches
    figure = _pyplot().figure(figsize=(whole + 0.4, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(names), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, name in zip(parts, names):
        words = (whole - 2 * SHOWN[name][0]) / 3
        columns = [words, SHOWN[name][0], SHOWN[name][0], words, words]
        axes = part.subplots(count, 5, gridspec_kw={"width_ratios": columns}, squeeze=False)
        if name == "text":
            _stories(axes, system, seed, int(14 * words))
        else:
            _section(axes, system, name, corpus, seed, int(14 * words))
    _finish(figure, out, title)


def _section(axes, system, name, corpus, seed, letters):
    """A row of axes for each case of one modality; `letters` fit a line of words."""
    count, rng, scenes = len(axes), np.random.default_rng(seed), None
    if corpus is None:
        world = WORLDS[name]
        kinds = [{"things": 1 + i % 2} if name == "image" else {} for i in range(count)]
        scenes = [world.sample(rng, held_out=i >= count - max(1, count // 4), **kind)
                  for i, kind in enumerate(kinds)]
        texts = [world.describe(scene, rng) for scene in scenes]
        options = {"size": system.picture_size} if name == "image" else {}
        true = torch.from_numpy(np.stack([world.render(scene, rng, **options)
                                          for scene in scenes]))
    else:
        pairs = [(document[0][1], document[1][1]) for document in corpus.documents
                 if document[1][0] == name][:count]
        texts = [text for text, _ in pairs]
        true = to_signal(corpus.signals[name][[number for _, number in pairs]])
    drawn, written = system.draw(texts, name), system.caption(true, name)
    for axis in axes[len(texts):].flat:
        axis.axis("off")
    for i, (row, text) in enumerate(zip(axes, texts)):
        unseen = scenes is not None and world.is_held_out(scenes[i])
        _say(row[0], ("[unseen pair] " if unseen else "") + text, letters)
        draw_signal(row[1], name, true[i], "true" if i == 0 else "")
        draw_signal(row[2], name, drawn[i], "generated" if i == 0 else "")
        if scenes is None:
            _say(row[3], "", letters)
            _say(row[4], written[i], letters, "green" if written[i] == text else "black")
        else:
            read, colour = verdict(world, world.grade(drawn[i].numpy()), scenes[i])
            _say(row[3], read, letters, colour)
            _say(row[4], written[i], letters,
                 verdict(world, world.parse(written[i]), scenes[i])[1])
    axes[0][0].set_title("prompt", fontsize=8, loc="left")
    axes[0][3].set_title("what the grader reads in it" if scenes else "", fontsize=8, loc="left")
    axes[0][4].set_title("generated caption of the true one", fontsize=8, loc="left")


def _stories(axes, system, seed, letters):
    """A row for each story: its first words, how the model goes on, and whether that is right."""
    rng = np.random.default_rng(seed)
    openings = [stories.opening(stories.describe(stories.sample(rng), rng)) for _ in axes]
    documents = system.complete([[("text", text)] for text in openings], spans=0)
    for row, text, document in zip(axes, openings, documents):
        told = document[0][1]
        right, whole = stories.grade(told) is not None, stories.parse(told) is not None
        verdict = ("right" if right else "its answer is wrong" if whole else "not a story")
        for axis in row:
            axis.axis("off")
        _say(row[0], text, letters)
        _say(row[3], told[len(text):].strip(), letters)
        _say(row[4], verdict, letters, "green" if right else "firebrick")
    for place, called in ((0, "a story's first words"), (3, "how the model goes on"),
                          (4, "the story")):
        axes[0][place].set_title(called, fontsize=8, loc="left")


def reconstructions(signals, rebuilt, out, title):
    """Pictures (of spectra: low notes at the bottom) above, what an autoencoder makes of them
    below."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, len(signals), figsize=(1.2 * len(signals), 3.2),
                                   squeeze=False, layout="constrained")
    for k, pair in enumerate(zip(signals, rebuilt)):
        for axis, signal, called in zip(axes[:, k], pair, ("true", "rebuilt")):
            axis.set_title(called if k == 0 else "", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            if len(signal) == 1:
                axis.imshow(np.asarray(signal[0]), origin="lower", aspect="auto", cmap="magma",
                            vmin=-1, vmax=1)
            else:
                axis.imshow(to_bytes(signal).transpose(1, 2, 0), interpolation="nearest")
    _finish(figure, out, title)


# --- tours: what `python mot.py` and the others print --------------------------------------------

def demo_pictures(count, seed=0):
    """`count` pictures of the shapes world, (count, 3, 32, 32) in [-1, 1]."""
    corpus = toy_corpus("shapes", np.random.default_rng(seed), count)
    return to_signal(corpus.signals["image"][:count])


def demo(bottleneck):
    """A real batch of the shapes world and its layout; the autoencoder behind it is untrained."""
    from system import layout_of
    from vqvae import VQVAE, Codec, VQVAEConfig
    torch.manual_seed(0)
    corpus = toy_corpus("shapes", np.random.default_rng(0), 400)
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
    print(f"\nforward FLOPs per position: {flops_per_position(model, batch):,.0f} "
          "(training: about three times)")


def flops_per_position(model, batch):
    """Of a forward pass."""
    with count_flops() as counter:
        model.loss(batch)
    return counter.get_total_flops() / batch.tokens.numel()


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
        shown = name.count(".") <= 2 or re.search(r"\.copies\.\d+$", name)         # towers
        if name and shown and not name.startswith(later):
            hooks.append(module.register_forward_hook(report(name)))
    with torch.no_grad():
        loss, parts = model.loss(batch)
    words = ", ".join(f"{name} {value.item():.3f}" for name, value in parts.items()
                      if "noise" not in name and "accuracy" not in name)
    if hasattr(model, "noised"):
        share = (model.noised(batch, 1).sum() / batch.real[1].sum()).item()
        words += f" (of the {share:.0%} that are noised; clean ones add nothing)"
    print(f"  {'loss (untrained)':<34}{loss.item():.3f}, before weighting: {words}")
    for hook in hooks:
        hook.remove()


def parameters_by_part(model):
    """Parameters by part, and by tower where a part is untied."""
    counts, present = {}, (True, *model.layout.shapes[1:])
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if part == "blocks":
            part = "blocks, " + ("attention" if "attention." in name
                                 else "ffn" if "ffn." in name else "norms")
        if ".copies." in name:
            untied, number = re.match(r"(.+)\.copies\.(\d+)", name).groups()
            towers = model.get_submodule(untied).towers
            users = [kind for kind, tower, shape in zip(MODALITIES, towers, present)
                     if tower == int(number) and shape]
            part += f", tower {number} ({', '.join(users)})"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts | {"in all": sum(counts.values())}
