"""scores.py: systems whose answers are known get the scores that they earn."""

import importlib.util
import math
import re

import numpy as np
import pytest
import torch

import small
from adapter import ROOT, load

corpora, data, scores = load("corpora"), load("data"), load("scores")
shapes, stories, tones = load("worlds.shapes"), load("worlds.stories"), load("worlds.tones")
motion = load("worlds.motion")


class Known:
    """A system that draws and reads by the worlds' own rules, but errs in every third case."""

    picture_size = 32

    def __init__(self, errs, names=("image",)):
        self.errs, self.codecs = errs, dict.fromkeys(names)

    def wrong(self, i):
        return self.errs and i % 3 == 0

    def draw(self, captions, name):
        world = corpora.WORLDS[name]
        return self.render([world.parse(caption) for caption in captions], name)

    def follow(self, segments, name):
        assert name == "audio" and {kind for kind, _ in segments} == {"video"}
        grade = corpora.WORLDS["video"].grade
        seen = [grade(clip.numpy()) for _, clip in segments]
        return self.render(list(map(corpora.sound_of_clip, seen)), name)

    def render(self, scenes, name):
        drawn = [corpora.WORLDS[name].render(scene) for scene in scenes]
        return torch.from_numpy(np.stack([np.zeros_like(signal) if self.wrong(i) else signal
                                          for i, signal in enumerate(drawn)]))

    def caption(self, signals, name):
        rng, world = np.random.default_rng(0), corpora.WORLDS[name]
        return ["a cat." if self.wrong(i) else world.describe(world.grade(signal.numpy()), rng)
                for i, signal in enumerate(signals)]

    def complete(self, prompts, spans):
        """Opens a span of the modality whose world can read the caption."""
        assert spans == 0
        kinds = [next(name for name, world in corpora.WORLDS.items() if world.parse(prompt[0][1]))
                 for prompt in prompts]
        return [prompt if self.wrong(i) else [*prompt, (kind, None)]
                for i, (prompt, kind) in enumerate(zip(prompts, kinds))]

    def encode(self, name, signals):
        return signals

    def decode(self, name, encoded):
        kept = [not self.wrong(i) for i in range(len(encoded))]
        return encoded * torch.tensor(kept).view(-1, *[1] * (encoded.dim() - 1))


@pytest.mark.parametrize("errs, expected", [(False, 1.0), (True, 2 / 3)])
@pytest.mark.parametrize("names, count", [(("image",), 10), (("audio",), 5), (("video",), 5),
                                          (("image", "audio", "video"), 21)])
def test_a_system_that_errs_in_a_third_of_cases_scores_two_thirds(errs, expected, names, count):
    found = scores.score_toys(Known(errs, names), count=12)
    shares = [name for name in found if f"{name}_n" in found and not name.endswith("psnr")]
    assert len(shares) == count
    for name in shares:
        assert found[name] == pytest.approx(expected), name
        few = name.endswith("heldout") and name.startswith(("audio", "video"))
        assert found[f"{name}_n"] == (24 if name == "generation_exact" else 3 if few else 12)


def test_held_out_cases_hold_a_pair_that_training_never_has():
    asked = {}

    class Asked(Known):
        def draw(self, captions, name):
            world = corpora.WORLDS[name]
            asked.setdefault(name, []).append({world.is_held_out(world.parse(caption))
                                               for caption in captions})
            return super().draw(captions, name)
    scores.score_toys(Asked(False, ("image", "audio", "video")), count=12)
    assert asked == {"image": [{False}, {False}, {True}], "audio": [{False}, {True}],
                     "video": [{False}, {True}]}


def test_pictures_that_are_right_but_unclean_count_as_nearest_alone():
    class Noisy(Known):
        def draw(self, captions, name):
            drawn = super().draw(captions, name)
            return drawn + 0.25 * torch.randn(drawn.shape, generator=torch.manual_seed(0))
    found = scores.score_generation(Noisy(False), "image", 12, 0)
    for kind in ("_one", "_two", "_heldout"):
        assert found[f"generation_exact{kind}"] == 0 and found[f"generation_nearest{kind}"] == 1


@pytest.mark.parametrize("share", (1.0, 0.2))
def test_a_model_that_knows_the_grammar_has_no_loss_above_its_entropy(share):
    """A model whose loss is that of the grammar, spread evenly over the tokens of each batch."""
    class Grammar:
        def loss(self, batch):
            total = nats = 0
            for row, targets in zip(batch.tokens, batch.targets):
                text = small.TOKENIZER.decode(row[1:int((targets >= 0).sum())].tolist())
                nats -= stories.log_probability(text) + math.log(share)
                total += int((targets >= 0).sum())
            return None, {"text": nats / total, "text_accuracy": 0.0}
    rng = np.random.default_rng(0)
    texts = [stories.describe(stories.sample(rng), rng) for _ in range(40)]

    class Told(Known):
        """Goes on with the very story, but stops short in every third case."""
        def complete(self, prompts, spans):
            for (_, start), text in zip(sum(prompts, []), texts):
                assert text.startswith(start) and len(start) < 0.8 * len(text)
            return [[("text", text[:-1] if self.wrong(i) else text)]
                    for i, text in enumerate(texts)]
    system = Told(True)
    system.model, system.tokenizer, system.device = Grammar(), small.TOKENIZER, "cpu"
    system.positions, system.layout = small.POSITIONS, small.LAYOUT["transfusion"]
    found = scores.score_stories(system, 40, 0, share)
    assert found["text_excess"] == pytest.approx(0, abs=1e-6) and found["text_loss_n"] == 40
    assert found["text_entropy"] == pytest.approx(found["text_loss"], rel=0.1)
    assert found["story_exact"] == 26 / 40


@pytest.mark.parametrize("setting", small.SETTINGS)
def test_token_accuracy_against_a_loop_over_the_ids_of_captions(setting):
    encoded, layout = small.signals(setting)["image"], small.LAYOUT[setting]
    texts = ["a", "ba", "aab", "abba", "babab", "b"]
    documents = [data.tokenize([("image", i), ("text", text)], small.TOKENIZER)
                 for i, text in enumerate(texts)]
    system = Known(False)
    system.model, system.tokenizer, system.layout = small.model(setting), small.TOKENIZER, layout
    system.positions, system.device = small.POSITIONS, "cpu"
    # a head that likes the two letters, so that some answers are right
    system.model.head.weight.data[[ord("a"), ord("b")]] *= 20
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
    accuracy = scores.text_loss(system, documents, lambda targets: (targets >= 0) & (targets < 256),
                                {"image": encoded}, batch=4)[1]
    assert accuracy == pytest.approx(int(right) / total)
    assert 0 < right < total


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert scores.psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-4)      # of a range of 2
    assert math.isfinite(scores.psnr(a, a))


@pytest.mark.parametrize("errs", [False, True])
def test_what_is_misread_is_counted_by_what_happens_in_a_clip(errs, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("misread", ROOT / "docs" / "misread.py")
    misread = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(misread)
    monkeypatch.setattr(misread, "CASES", 24)
    monkeypatch.setattr(misread, "load_system", lambda path: Known(errs, ("video",)))
    monkeypatch.setattr("sys.argv", ["misread.py", "runs/mot-all"])
    misread.main()
    rows = re.findall(r"(.+?) +(\d+) of (\d+)  .+", capsys.readouterr().out)
    assert [action for action, _, _ in rows] == list(motion.ACTIONS)
    assert sum(int(count) for _, _, count in rows) == 24
    assert sum(int(wrong) for _, wrong, _ in rows) == 8 * errs
