"""Exact scores of a trained system, on held-out cases, from what it generates alone.

Each score is a share of cases (0..1) with the number of cases beside it (`..._n`):

    generation_exact          caption -> picture that the grader reads as the caption's very scene
      ..._one, ..._two          the same by number of things; ..._heldout: an unseen (shape, colour)
    caption_exact             picture -> caption that parses to the picture's very scene
    boi_rate                  after a caption, and nothing more, the model itself opens a picture
    reconstruction_exact      what the autoencoder alone lets through: the ceiling of those above
    reconstruction_psnr       of the same pictures, in dB

Your own pictures have no grader: `score_folder` measures captions and reconstructions against
the files.
"""

import numpy as np
import torch

from data import IGNORE, measure, pack, to_signal, tokenize
from worlds import shapes


def psnr(a, b):
    """Mean over pictures of the peak signal-to-noise ratio, in dB, for signals in [-1, 1]."""
    error = (a - b).square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4 / error)).mean().item()


def shape_cases(count, rng, size, **kind):
    """`count` fresh scenes of a kind -> (scenes, captions, pictures)."""
    scenes = [shapes.sample(rng, **kind) for _ in range(count)]
    pictures = np.stack([shapes.render(scene, rng, size) for scene in scenes])
    return scenes, [shapes.describe(scene, rng) for scene in scenes], torch.from_numpy(pictures)


def grade_all(pictures):
    return [shapes.grade(picture.numpy()) for picture in pictures]


def exact(read, scenes):
    return sum(a == b for a, b in zip(read, scenes)) / len(scenes)


def score_reconstruction(autoencoder_roundtrip, count=512, seed=12345, size=32):
    """Scores of the autoencoder alone; autoencoder_roundtrip: pictures -> pictures."""
    scenes, _, pictures = shape_cases(count, np.random.default_rng(seed), size)
    rebuilt = autoencoder_roundtrip(pictures)
    return {"reconstruction_exact": exact(grade_all(rebuilt), scenes),
            "reconstruction_exact_n": count,
            "reconstruction_psnr": psnr(rebuilt, pictures), "reconstruction_psnr_n": count}


def score_shapes(system, count=512, seed=12345):
    """All scores of a system on the shapes world, `count` cases for each.

    Scenes come from a seed that training never uses, so their pictures are new; two-thing scenes
    and held-out pairs are, nearly always or always, new as scenes too. Pictures are drawn as the
    model's `generate` does by itself.
    """
    size, scores = system.picture_size, {}
    torch.manual_seed(seed)
    for name, kind in (("_one", {"things": 1}), ("_two", {"things": 2}),
                       ("_heldout", {"held_out": True})):
        rng = np.random.default_rng(seed + len(scores))
        scenes, captions, _ = shape_cases(count, rng, size, **kind)
        read = grade_all(system.draw(captions))
        scores[f"generation_exact{name}"] = exact(read, scenes)
        scores[f"generation_exact{name}_n"] = count
    scores["generation_exact"] = (scores["generation_exact_one"]
                                  + scores["generation_exact_two"]) / 2
    scores["generation_exact_n"] = 2 * count
    scenes, captions, pictures = shape_cases(count, np.random.default_rng(seed + 100), size)
    read = [shapes.parse(caption) for caption in system.caption(pictures)]
    scores |= {"caption_exact": exact(read, scenes), "caption_exact_n": count}
    documents = system.complete([[("text", caption)] for caption in captions], spans=0)
    opened = [document == [("text", caption), ("image", None)]
              for document, caption in zip(documents, captions)]
    scores |= {"boi_rate": sum(opened) / count, "boi_rate_n": count}
    def roundtrip(pictures):
        return system.decode("image", system.encode("image", pictures))
    return scores | score_reconstruction(roundtrip, count, seed, size)


def score_folder(system, corpus, count=512):
    """Scores on held-out pictures of your own: a Corpus of pairs."""
    pairs = [(document[0][1], document[1][1]) for document in corpus.documents][:count]
    pictures = to_signal(corpus.signals["image"][[number for _, number in pairs]])
    longest = max(len(system.tokenizer.encode(text)) for text, _ in pairs)
    written = system.caption(pictures, new_text=longest + 4)
    rebuilt = system.decode("image", system.encode("image", pictures))
    right = sum(a == text for a, (text, _) in zip(written, pairs))
    return {"caption_token_accuracy": token_accuracy(system, corpus),
            "caption_token_accuracy_n": len(corpus.documents),
            "caption_exact": right / len(pairs), "caption_exact_n": len(pairs),
            "reconstruction_psnr": psnr(rebuilt, pictures), "reconstruction_psnr_n": len(pairs)}


@torch.no_grad()
def token_accuracy(system, corpus, batch=8):
    """Share of caption ids that are the model's first choice, given picture and true ids before."""
    encoded = {"image": system.encode("image", to_signal(corpus.signals["image"]))}
    documents = [tokenize(document[::-1], system.tokenizer) for document in corpus.documents]
    length = max(measure(document, system.positions) for document in documents)
    right = total = 0
    for start in range(0, len(documents), batch):
        rows = [[document] for document in documents[start:start + batch]]
        packed = pack(rows, length, system.layout, system.positions, encoded)
        is_text = (packed.targets >= 0) & (packed.targets < system.layout.text)
        packed = packed._replace(targets=packed.targets.where(is_text, IGNORE))
        share = system.model.loss(packed.to(system.device))[1]["text_accuracy"]
        right, total = right + float(share) * int(is_text.sum()), total + int(is_text.sum())
    return right / total
