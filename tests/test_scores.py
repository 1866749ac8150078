"""scores.py: systems whose answers are known get the scores that they earn."""

import math

import numpy as np
import pytest
import torch

import small
from adapter import load

data, scores, shapes = load("data"), load("scores"), load("worlds.shapes")


class Known:
    """A system that draws and reads by the world's own rules, but errs in every third case."""

    picture_size = 32

    def __init__(self, errs):
        self.errs = errs

    def wrong(self, i):
        return self.errs and i % 3 == 0

    def draw(self, captions):
        drawn = [shapes.render(shapes.parse(caption)) for caption in captions]
        return torch.from_numpy(np.stack([np.zeros_like(picture) if self.wrong(i) else picture
                                          for i, picture in enumerate(drawn)]))

    def caption(self, pictures):
        rng = np.random.default_rng(0)
        return ["a cat." if self.wrong(i) else shapes.describe(shapes.grade(picture.numpy()), rng)
                for i, picture in enumerate(pictures)]

    def complete(self, prompts, spans):
        assert spans == 0
        return [prompt if self.wrong(i) else [*prompt, ("image", None)]
                for i, prompt in enumerate(prompts)]

    def encode(self, name, signals):
        return signals

    def decode(self, name, encoded):
        return torch.where(torch.tensor([self.wrong(i) for i in range(len(encoded))])
                           [:, None, None, None], -encoded, encoded)


@pytest.mark.parametrize("errs, expected", [(False, 1.0), (True, 2 / 3)])
def test_a_system_that_errs_in_a_third_of_cases_scores_two_thirds(errs, expected):
    found = scores.score_shapes(Known(errs), count=12)
    shares = [name for name in found if f"{name}_n" in found and not name.endswith("psnr")]
    assert len(shares) == 7
    for name in shares:
        assert found[name] == pytest.approx(expected), name
        assert found[f"{name}_n"] == (24 if name == "generation_exact" else 12)


def test_held_out_cases_hold_a_pair_that_training_never_has():
    asked = []

    class Asked(Known):
        def draw(self, captions):
            asked.append([shapes.is_held_out(shapes.parse(caption)) for caption in captions])
            return super().draw(captions)
    scores.score_shapes(Asked(False), count=12)
    assert [set(kind) for kind in asked] == [{False}, {False}, {True}]


@pytest.mark.parametrize("setting", small.SETTINGS)
def test_token_accuracy_against_a_loop_over_the_ids_of_captions(setting, monkeypatch):
    encoded, layout = small.signals(setting)["image"], small.LAYOUT[setting]
    texts = ["a", "bc", "def", "ghij", "klmno", "p"]
    corpus = data.Corpus([[("text", text), ("image", i)] for i, text in enumerate(texts)],
                         {"image": np.zeros((6, 3, 32, 32), np.uint8)})
    system = Known(False)
    system.model, system.tokenizer, system.layout = small.model(setting), small.TOKENIZER, layout
    system.positions, system.device = small.POSITIONS, "cpu"
    monkeypatch.setattr(system, "encode", lambda name, signals: encoded)
    # a head that likes some ids, so that some answers are right
    system.model.head.weight.data[[ord(c) for c in "abcdefghijklmnop"]] *= 5
    right = total = 0
    for i, text in enumerate(texts):
        batch = small.prompts(setting, [[("image", i), ("text", text)]])
        times = [x if x is None else torch.zeros(len(x)) for x in batch.signals]
        with torch.no_grad():
            hidden = system.model(*([batch, times] if setting == "transfusion" else [batch]))
            said = system.model.head(hidden)[0].argmax(-1)
        start = batch.tokens[0].tolist().index(layout.end[1]) + 1
        right += sum(said[start + k - 1] == ord(c) for k, c in enumerate(text))
        total += len(text)
    assert scores.token_accuracy(system, corpus, batch=4) == pytest.approx(int(right) / total)
    assert 0 < right < total


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert scores.psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-4)      # of a range of 2
    assert math.isfinite(scores.psnr(a, a))
