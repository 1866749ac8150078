"""Exact scores of a trained system, on held-out cases, from what it generates alone.

Each score is a share of cases (0..1) with the number of cases beside it (`..._n`):

    generation_exact          caption -> picture that the grader reads as the caption's very scene
      ..._one, ..._two          the same by number of things; ..._heldout: an unseen (shape, colour)
    generation_nearest_...    the same, were the grader to read unclean pictures too
    caption_exact             picture -> caption that parses to the picture's very scene
    boi_rate                  after a caption, and nothing more, the model itself opens a picture
    reconstruction_exact      what the autoencoder alone lets through: a bound to what is drawn
    reconstruction_psnr       of the same pictures, in dB

Sounds and clips have the same scores with audio_ and video_ before them (the PSNR of sounds is that
of their spectra); `sound_of_video_exact`: a clip is followed by the sound that belongs to it. And
of stories:

    text_loss                 nats per token of fresh stories, <eos> included
    text_entropy              the least that any model can reach: the grammar's entropy, and what it
                              takes to know that a document is a story, where there are others
    text_excess               how far the loss is above that least for these very stories
    story_exact               the first words of a story become a story whose answer is right

Your own files have no grader: `score_folder` measures captions and reconstructions against them.
"""

import math

import numpy as np
import torch

from corpora import WORLDS, sound_of_clip
from data import IGNORE, measure, pack, to_signal, tokenize
from vqvae import spectrum
from worlds import shapes, stories

SEED = 12345            # of all cases; they take this and the next few hundred
PREFIX = {"image": "", "audio": "audio_", "video": "video_"}
BEGIN_RATE = {"image": "boi_rate", "audio": "boa_rate", "video": "bov_rate"}
KINDS = {"image": {"_one": {"things": 1}, "_two": {"things": 2}, "_heldout": {"held_out": True}},
         "audio": {"": {}, "_heldout": {"held_out": True}},
         "video": {"": {}, "_heldout": {"held_out": True}}}


def psnr(a, b):
    """Mean over signals of the peak signal-to-noise ratio, in dB, for signals in [-1, 1]."""
    error = (a - b).square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4 / error)).mean().item()


def closeness(name, rebuilt, signals):
    """PSNR of a modality's signals in dB; of sounds, whose phases are guessed, that of spectra."""
    if name == "audio":
        rebuilt, signals = spectrum(rebuilt), spectrum(signals)
    return psnr(rebuilt, signals)


def fresh_cases(name, count, rng, size=32, **kind):
    """`count` fresh scenes of a modality's world -> (scenes, captions, signals)."""
    world, options = WORLDS[name], {"size": size} if name == "image" else {}
    scenes = [world.sample(rng, **kind) for _ in range(count)]
    signals = np.stack([world.render(scene, rng, **options) for scene in scenes])
    return scenes, [world.describe(scene, rng) for scene in scenes], torch.from_numpy(signals)


def grade_all(name, signals):
    return [WORLDS[name].grade(signal.numpy()) for signal in signals]


def exact(read, scenes):
    return sum(a == b for a, b in zip(read, scenes)) / len(scenes)


# --- toy worlds ----------------------------------------------------------------------------------

def score_toys(system, count=512, seed=SEED, stories_share=0.0):
    """All scores of a system on the toy worlds that it was trained on, `count` cases for each (of
    held-out sounds and clips a quarter).

    Scenes come from a seed that training never uses, so their signals are new; two-thing scenes
    and held-out pairs are, nearly always or always, new as scenes too. Signals are drawn as the
    model's `generate` does by itself. stories_share: of the documents that training draws.
    """
    torch.manual_seed(seed)
    scores = {}
    for name in system.codecs:
        scores |= score_generation(system, name, count, seed)
        scores |= score_captions(system, name, count, seed + 100)
        scores |= score_reconstruction(system, name, count, seed)
    if {"audio", "video"} <= set(system.codecs):
        scores |= score_sound_of_video(system, count, seed + 200)
    if stories_share:
        scores |= score_stories(system, count, seed, stories_share)
    return scores


def score_generation(system, name, count, seed):
    """Captions of fresh scenes, of every kind of the world, become signals, which are graded."""
    scores, prefix = {}, PREFIX[name]
    for number, (kind, options) in enumerate(KINDS[name].items()):
        rng, cases = np.random.default_rng(seed + 2 * number), count
        if kind == "_heldout" and name != "image":      # sounds and clips take long to draw
            cases = max(1, count // 4)
        scenes, captions, _ = fresh_cases(name, cases, rng, system.picture_size, **options)
        drawn, found = system.draw(captions, name), {}
        if name == "image":
            read = [shapes.read(picture.numpy()) for picture in drawn]
            found["nearest"] = exact([scene for scene, _ in read], scenes)
            found["exact"] = exact([scene if clean else None for scene, clean in read], scenes)
        else:
            found["exact"] = exact(grade_all(name, drawn), scenes)
        for what, share in found.items():
            scores[f"{prefix}generation_{what}{kind}"] = share
            scores[f"{prefix}generation_{what}{kind}_n"] = cases
    if "generation_exact_one" in scores:
        scores["generation_exact"] = (scores["generation_exact_one"]
                                      + scores["generation_exact_two"]) / 2
        scores["generation_exact_n"] = 2 * count
    return scores


def score_captions(system, name, count, seed):
    """Fresh signals become captions; and after a caption the model itself opens a span."""
    scenes, captions, signals = fresh_cases(name, count, np.random.default_rng(seed),
                                            system.picture_size)
    read = [WORLDS[name].parse(caption) for caption in system.caption(signals, name)]
    documents = system.complete([[("text", caption)] for caption in captions], spans=0)
    opened = [document == [("text", caption), (name, None)]
              for document, caption in zip(documents, captions)]
    prefix, rate = PREFIX[name], BEGIN_RATE[name]
    return {f"{prefix}caption_exact": exact(read, scenes), f"{prefix}caption_exact_n": count,
            rate: sum(opened) / count, f"{rate}_n": count}


def score_reconstruction(system, name, count=512, seed=SEED):
    """What the autoencoder alone lets through; `system` needs no more than encode and decode."""
    scenes, _, signals = fresh_cases(name, count, np.random.default_rng(seed),
                                     system.picture_size)
    rebuilt, prefix = system.decode(name, system.encode(name, signals)), PREFIX[name]
    return {f"{prefix}reconstruction_exact": exact(grade_all(name, rebuilt), scenes),
            f"{prefix}reconstruction_exact_n": count,
            f"{prefix}reconstruction_psnr": closeness(name, rebuilt, signals),
            f"{prefix}reconstruction_psnr_n": count}


def score_sound_of_video(system, count, seed):
    """A fresh clip, and nothing else, is followed by the sound that belongs to it."""
    scenes, _, clips = fresh_cases("video", count, np.random.default_rng(seed))
    drawn = system.follow([("video", clip) for clip in clips], "audio")
    return {"sound_of_video_exact": exact(grade_all("audio", drawn),
                                          [sound_of_clip(scene) for scene in scenes]),
            "sound_of_video_exact_n": count}


def score_stories(system, count, seed, share):
    """The loss on fresh stories beside the least loss that is possible, in nats per token.

    A document is a story with probability `share`, which it costs -log(share) nats to know.
    """
    rng = np.random.default_rng(seed)
    texts = [stories.describe(stories.sample(rng), rng) for _ in range(count)]
    documents = [tokenize([("text", text)], system.tokenizer) for text in texts]
    tokens = sum(len(document[0][1]) + 1 for document in documents)         # and <eos>
    least = -sum(stories.log_probability(text) + math.log(share) for text in texts)
    loss, _ = text_loss(system, documents, lambda targets: targets >= 0)
    told = [document[0][1] for document in system.complete(
        [[("text", stories.opening(text))] for text in texts], spans=0)]
    return {"story_exact": sum(stories.grade(text) is not None for text in told) / count,
            "story_exact_n": count, "text_loss": loss, "text_loss_n": count,
            "text_entropy": (stories.entropy() - math.log(share)) * count / tokens,
            "text_excess": loss - least / tokens}


@torch.no_grad()
def text_loss(system, documents, counts, encoded=None, batch=16):
    """Mean loss and accuracy of the targets that `counts` picks, over tokenized documents; nan
    where it picks none."""
    length = max(measure(document, system.positions) for document in documents)
    loss = right = total = 0
    for start in range(0, len(documents), batch):
        rows = [[document] for document in documents[start:start + batch]]
        packed = pack(rows, length, system.layout, system.positions, encoded)
        counted = counts(packed.targets)
        packed = packed._replace(targets=packed.targets.where(counted, IGNORE))
        n = int(counted.sum())
        if n:
            parts, total = system.model.loss(packed.to(system.device))[1], total + n
            loss, right = loss + float(parts["text"]) * n, right + float(parts["text_accuracy"]) * n
    return (loss / total, right / total) if total else (math.nan, math.nan)


# --- your own files ------------------------------------------------------------------------------

def score_folder(system, corpus, count=512):
    """Scores on held-out files of your own: a Corpus of pairs, words first."""
    scores = {}
    for name in corpus.signals:
        pairs = [(document[0][1], document[1][1]) for document in corpus.documents
                 if document[1][0] == name][:count]
        signals = to_signal(corpus.signals[name][[number for _, number in pairs]])
        encoded = system.encode(name, signals)
        longest = max(len(system.tokenizer.encode(text)) for text, _ in pairs)
        written = system.caption(signals, name, new_text=longest + 4)
        right = sum(a == text for a, (text, _) in zip(written, pairs))
        documents = [tokenize([(name, number), ("text", text)], system.tokenizer)
                     for number, (text, _) in enumerate(pairs)]
        accuracy = text_loss(system, documents, lambda targets:
                             (targets >= 0) & (targets < system.layout.text), {name: encoded})[1]
        found = {"caption_exact": right / len(pairs)}
        if not math.isnan(accuracy):            # as it is where all captions are empty
            found["caption_token_accuracy"] = accuracy
        for what, value in found.items():
            scores |= {PREFIX[name] + what: value, f"{PREFIX[name]}{what}_n": len(pairs)}
        scores |= score_psnr(system, name, corpus, count)
    return scores


def score_psnr(system, name, corpus, count=512):
    """How near the autoencoder brings held-out signals of your own; of sounds, their spectra."""
    signals = to_signal(corpus.signals[name][:count])
    rebuilt = system.decode(name, system.encode(name, signals))
    return {f"{PREFIX[name]}reconstruction_psnr": closeness(name, rebuilt, signals),
            f"{PREFIX[name]}reconstruction_psnr_n": len(signals)}
