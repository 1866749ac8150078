"""transfusion.py: its mask, its noise and its cache against loops; generation against no cache."""

import dataclasses
import math

import pytest
import torch

import naive
import small
from adapter import load

data, transfusion = load("data"), load("transfusion")

LAYOUT = small.LAYOUT["transfusion"]
IMAGE, AUDIO, VIDEO = KINDS = 1, 2, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return small.model("transfusion")


def pack(*args, **options):
    return small.pack("transfusion", *args, **options)


# --- the idea ------------------------------------------------------------------------------------

@pytest.mark.parametrize("spans", [None, small.PADDED], ids=["as many as there are", "padded"])
def test_attention_mask_against_a_triple_loop(spans):
    batch = pack(spans=spans)
    mask = transfusion.attention_mask(batch.span, batch.document)
    assert mask.shape == (2, 1, small.LENGTH, small.LENGTH)
    assert torch.equal(mask[:, 0], small.reaches(batch, whole_spans=True))


def test_attention_mask_of_the_papers_figure():
    span = torch.tensor([[0, 0, 1, 1, 0, 2, 2]])
    mask = transfusion.attention_mask(span, torch.ones_like(span))[0, 0]
    assert ["".join("#" if x else "." for x in row) for row in mask] == [
        "#......", "##.....", "####...", "####...", "#####..", "#######", "#######"]


def test_add_noise_goes_straight_from_data_to_noise_at_its_velocity():
    x_0, noise = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0])
    for t, x_t in ((0.0, [2.0, -1.0]), (0.25, [2.5, 0.0]), (1.0, [4.0, 3.0])):
        found, velocity = transfusion.add_noise(x_0, noise, torch.tensor(t))
        assert found.tolist() == x_t and velocity.tolist() == [2.0, 4.0]


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.5)])
def test_sample_times_are_logit_normal(mean, std):
    t = transfusion.sample_times(100_000, mean, std, "cpu")
    logit = (t / (1 - t)).log()
    assert 0 < t.min() and t.max() < 1
    assert logit.mean().item() == pytest.approx(mean, abs=0.01 * std)     # three standard errors
    assert logit.std().item() == pytest.approx(std, abs=0.007 * std)


def test_guide_goes_beyond_the_conditional_by_its_distance_from_the_unconditional():
    c, u = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    for guidance, expected in ((1, [3.0, 1.0]), (0, [1.0, 2.0]), (3, [7.0, -1.0])):
        assert transfusion.guide(c, u, guidance).tolist() == expected


def test_patchify_cuts_in_raster_order_and_unpatchify_undoes_it():
    x = torch.randn(3, 5, 4, 6)
    patches = transfusion.patchify(x, 2)
    assert patches.shape == (3, 6, 20)
    for n, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        square = x[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
        assert torch.equal(patches[:, n], square.flatten(1))
    assert torch.equal(transfusion.unpatchify(patches, (5, 4, 6), 2), x)


def test_the_patches_of_a_clip_are_those_of_its_frames_in_turn():
    frames = torch.randn(3, 4, 5, 4, 6)                                     # (N, frames, C, h, w)
    clips = frames.transpose(1, 2).flatten(2, 3)                            # (N, C, frames * h, w)
    patches = transfusion.patchify(clips, 2)
    for number in range(4):
        torch.testing.assert_close(patches[:, 6 * number:6 * number + 6],
                                   transfusion.patchify(frames[:, number], 2), rtol=0, atol=0)


# --- who sees whom -------------------------------------------------------------------------------

def perturbed(batch, b, j):
    """The batch with what stands at position j of row b changed."""
    kind = batch.modality[b, j].item()
    if kind == 0:
        tokens = batch.tokens.clone()
        tokens[b, j] = (tokens[b, j] + 1) % 256
        return batch._replace(tokens=tokens)
    block = batch.order[sum(batch.sizes[:kind]):][:batch.sizes[kind]]
    place = (block == b * batch.tokens.shape[1] + j).nonzero().item()
    patches = transfusion.patchify(batch.signals[kind], 2)
    patches[divmod(place, small.POSITIONS[kind])] += 1
    latents = transfusion.unpatchify(patches, LAYOUT.shapes[kind], 2)
    return batch._replace(signals=tuple(latents if k == kind else x
                                        for k, x in enumerate(batch.signals)))


def test_what_stands_at_j_changes_what_follows_and_its_own_span_and_nothing_else(model):
    batch = pack(spans=small.PADDED)
    before, reaches = small.hidden(model, batch), small.reaches(batch, whole_spans=True)
    for b in range(2):
        for j in range(small.LENGTH):
            if batch.document[b, j]:
                after = small.hidden(model, perturbed(batch, b, j))
                changed = (after != before).any(-1)
                assert torch.equal(changed[b], reaches[b, :, j]) and not changed[1 - b].any()


def test_documents_packed_together_are_as_if_alone(model):
    batch = pack()
    together, all_times = small.hidden(model, batch), small.times(batch)
    drawn = [0, 0, 0, 0]
    for b, row in enumerate(small.ROWS):
        for number, document in enumerate(row, 1):
            alone = pack([[document]])
            times = [None] * 4
            for kind in KINDS:
                if alone.signals[kind] is not None:
                    start, drawn[kind] = drawn[kind], drawn[kind] + len(alone.signals[kind])
                    times[kind] = all_times[kind][start:drawn[kind]]
            with torch.no_grad():
                expected = model(alone, times)[0, alone.document[0] > 0]
            torch.testing.assert_close(together[b, batch.document[b] == number], expected,
                                       rtol=1e-5, atol=1e-5)


def test_what_stands_in_padding_changes_nothing(model):
    batch = pack(spans=small.PADDED)
    before, padding = small.hidden(model, batch), batch.document == 0
    tokens = batch.tokens.masked_fill(padding & (batch.modality == 0), 7)
    latents = [x if x is None else x + 5 * (real == 0)[:, None, None, None]
               for x, real in zip(batch.signals, batch.real)]
    after = small.hidden(model, batch._replace(tokens=tokens, signals=tuple(latents)))
    assert torch.equal(before[~padding], after[~padding])
    assert before.isfinite().all()


# --- the loss ------------------------------------------------------------------------------------

@pytest.fixture
def by_hand(monkeypatch):
    """Times and noise that do not depend on how many spans there are; gives what add_noise saw."""
    seen, add_noise = [], transfusion.add_noise

    def recorded(x_0, noise, t):
        seen.append((x_0, t, *add_noise(x_0, x_0.roll(1, -1), t)))
        return seen[-1][2:]

    monkeypatch.setattr(transfusion, "add_noise", recorded)
    monkeypatch.setattr(transfusion, "sample_times",
                        lambda count, *_: torch.full((count,), 0.8))
    return seen


def noised_patches(batch, kind):
    return int((batch.real[kind] * ~batch.shown[kind]).sum()) * small.POSITIONS[kind]


def test_the_loss_is_next_token_plus_five_times_diffusion_where_a_clean_patch_adds_nothing():
    for weight, options in ((5.0, {}), (2.0, {"diffusion_weight": 2.0})):
        model = small.model("transfusion", reading_weight=1.0, **options)
        loss, parts = model.loss(batch := pack(spans=small.PADDED))
        diffusion = sum(noised_patches(batch, kind) * parts[data.MODALITIES[kind]]
                        for kind in KINDS)
        patches = sum(int(batch.real[kind].sum()) * small.POSITIONS[kind] for kind in KINDS)
        torch.testing.assert_close(loss, parts["text"] + weight * diffusion / patches)


@pytest.mark.parametrize("reading", [1.0, 5.0])
def test_the_text_loss_against_a_loop_over_positions(by_hand, reading):
    """Words behind a span that opens their document weigh more in the loss, not in what is shown.
    """
    model = small.model("transfusion", reading_weight=reading, diffusion_weight=0.0)
    batch = pack(spans=small.PADDED)
    loss, parts = model.loss(batch)
    noisy = tuple(None if x is None else by_hand.pop(0)[2] for x in batch.signals)
    limited = [x if x is None else torch.where(shown, 0.0, 0.8)
               for x, shown in zip(batch.signals, batch.shown)]
    logits = model.head(model(batch._replace(signals=noisy), limited)).double()
    errors, right, weights = [], [], []
    for b in range(2):
        for i in range(small.LENGTH):
            last = i == small.LENGTH - 1
            following = LAYOUT.pad if last else batch.tokens[b, i + 1].item()
            same = not last and batch.document[b, i] == batch.document[b, i + 1] > 0
            if same and following != LAYOUT.pad and batch.modality[b, i] == 0:
                errors.append(-logits[b, i].log_softmax(-1)[following])
                right.append(float(logits[b, i].argmax() == following))
                row, start = small.ROWS[b], int(batch.document[b, i]) - 1
                opens = row[start][0][0] != "text" and len(row[start]) > 1
                first = (batch.document[b] == start + 1).nonzero()[0].item()
                weights.append(reading if opens and i > first + 1 else 1.0)
    expected = sum(w * error for w, error in zip(weights, errors)).item() / sum(weights)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert set(weights) == {1.0, reading}
    assert parts["text"].item() == pytest.approx(sum(errors).item() / len(errors), rel=1e-5)
    assert parts["text_accuracy"].item() == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("off, expected", [(0.0, 0.0), (0.5, 0.25)])
def test_a_velocity_that_is_off_by_c_costs_c_squared(model, by_hand, off, expected):
    class Exact(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, hidden):
            velocity = by_hand[KINDS.index(self.kind)][3]
            return transfusion.patchify(velocity, 2).flatten(0, 1) + off

    for kind in KINDS:
        model.patch_out[str(kind)] = Exact(kind)
    model.config = dataclasses.replace(model.config, reading_weight=1.0)
    loss, parts = model.loss(batch := pack(spans=small.PADDED))
    assert [parts[data.MODALITIES[kind]].item() for kind in KINDS] == [expected] * 3
    noised = sum(noised_patches(batch, kind) for kind in KINDS) / model.totals(batch)[1].item()
    assert loss.item() == pytest.approx(parts["text"].item() + 5 * expected * noised, rel=1e-6)
    for t in (parts[name] for name in parts if "noise_" in name):
        assert t.isnan() or t == expected


def test_padding_does_not_change_the_loss(model, by_hand):
    loss, parts = model.loss(pack())
    for spans in (small.PADDED, [0, 4, 4, 2], [0, 4, 2, 5]):
        padded = pack(spans=spans)
        assert any((padded.real[kind] == 0).any() for kind in KINDS)
        again, same = model.loss(padded)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
        for name in parts:
            torch.testing.assert_close(parts[name], same[name], rtol=1e-6, atol=1e-6,
                                       equal_nan=True)


def test_a_batch_that_happens_to_have_none_of_a_rare_modality_costs_nothing_for_it(model, by_hand):
    rows = [[[("text", "a"), ("image", 0)], [("audio", 1), ("text", "b")]]]
    loss, parts = model.loss(pack(rows))
    again, same = model.loss(pack(rows, spans=[0, 1, 1, 2]))     # clips are all padding
    assert again.isfinite() and same["video"].isnan() and "video" not in parts
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    again.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_by_noise_level_is_that_of_its_spans_alone(model, by_hand, monkeypatch):
    t = torch.tensor([0.1, 0.3, 0.4, 0.9])
    monkeypatch.setattr(transfusion, "sample_times", lambda count, *_: t[:count].clone())
    rows = [[[("text", "a"), ("image", n)] for n in range(3)], [[("text", "b"), ("image", 3)]]]
    _, parts = model.loss(pack(rows, length=40))
    assert parts["image_noise_2"].isnan()
    mean = (parts["image_noise_0"] + 2 * parts["image_noise_1"] + parts["image_noise_3"]) / 4
    torch.testing.assert_close(mean, parts["image"])


@pytest.mark.parametrize("limit, training", [(0.0, True), (0.5, True), (0.5, False)])
def test_what_precedes_its_words_is_noised_up_to_a_limit_and_has_no_loss_where_it_is_clean(
        by_hand, limit, training):
    model, batch = small.model("transfusion", shown_limit=limit).train(training), pack()
    _, parts = model.loss(batch)
    limit = limit if training else 0.0
    times = [None, *(torch.where(batch.shown[kind], limit * 0.8, 0.8) for kind in KINDS)]
    for (_, t, *_), kind in zip(by_hand, KINDS):
        assert batch.shown[kind].any() and not batch.shown[kind].all()
        torch.testing.assert_close(t.flatten(), times[kind])
    with torch.no_grad():
        hidden = model(batch._replace(signals=(None, *(seen[2] for seen in by_hand))), times)
    hidden, patches = hidden.flatten(0, 1)[batch.order].split(batch.sizes), 0
    for seen, kind in zip(by_hand, KINDS):
        target = transfusion.patchify(seen[3], 2)
        predicted = model.patch_out[str(kind)](hidden[kind]).view_as(target)
        counted = torch.ones_like(batch.shown[kind]) if limit else ~batch.shown[kind]
        expected = (predicted - target)[counted].square().mean()
        torch.testing.assert_close(parts[data.MODALITIES[kind]], expected.detach())
        patches += int(batch.real[kind].sum()) * small.POSITIONS[kind]
    assert model.totals(batch)[1] == patches


# --- the cache -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_for_text_and_across_spans_in_rows_of_other_lengths(model, kind):
    table, name, n = small.signals("transfusion"), data.MODALITIES[kind], small.POSITIONS[kind]
    starts = [[("text", "ab")], [("image", 1), ("text", "abcd")], [],
              [("video", 1), ("text", "x"), ("audio", 2)]]
    prompt = small.prompts("transfusion", [[*start, (name, None)] for start in starts])
    x_t, lengths = torch.randn(4, *LAYOUT.shapes[kind]), (prompt.document > 0).sum(1)
    with torch.no_grad():
        cache = transfusion.Cache(4, 40, "cpu")
        clean = [x if x is None else torch.zeros(len(x)) for x in prompt.signals]
        first = model(prompt, clean, cache)
        cache.lengths += lengths
        looked = model.extend(prompt, cache, 0, kind=kind, latents=x_t, t=0.7)      # not kept
        span = model.extend(prompt, cache, 1, kind=kind, latents=x_t, t=0.3)
        texts = [model.extend(prompt, cache, 1, torch.full((4, 1), i))
                 for i in (LAYOUT.end[kind], 120, 121)]
    assert cache.lengths.tolist() == (lengths + n + 3).tolist()
    for b, start in enumerate(starts):
        own = {**table, name: torch.cat([table[name], x_t[b:b + 1]])}
        whole = pack([[[*start, (name, len(table[name])), ("text", "xy")]]], table=own,
                     finished=False)
        for t, found in ((0.7, looked), (0.3, span)):
            times = [x if x is None else torch.zeros(len(x)) for x in whole.signals]
            times[kind][-1] = t
            with torch.no_grad():
                expected = model(whole, times)[0]
            at = lengths[b].item()
            assert found.shape[1] == n
            torch.testing.assert_close(found[b], expected[at:at + n], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(first[b, :at], expected[:at], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat(texts, 1)[b], expected[at + n:at + n + 3],
                                   rtol=1e-5, atol=1e-5)


# --- generation ----------------------------------------------------------------------------------

def test_greedy_text_is_that_of_a_loop_without_a_cache(model):
    documents = [[("text", "ab")], [("image", 1), ("text", "x"), ("audio", 0)], [],
                 [("text", "a"), ("video", 1)]]
    naive.check_latents(model, documents, size=24, spans=0, steps=1, guidance=1.0)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("spans", [1, 3])
def test_drawing_is_that_of_a_loop_without_a_cache_given_the_same_noise(model, guidance, spans):
    with torch.no_grad():           # begin spans often
        model.head.weight[list(LAYOUT.begin[1:])] *= 4.0
    documents = [[("text", "ab"), ("image", None)], [("audio", None)], [], [("video", None)],
                 [("image", 1), ("text", "what"), ("audio", 2), ("image", None)]]
    kinds = naive.check_latents(model, documents, 40, spans, 3, guidance)
    assert max(map(len, kinds)) == spans
    assert spans < 3 or max(len(set(row)) for row in kinds) > 1     # not all of one modality


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_each_modality_is_drawn_after_each_as_by_a_loop_without_a_cache(model, guidance):
    naive.check_crossing("transfusion", model, guidance)


def test_what_was_drawn_is_unpacked_as_what_it_is(model):
    """A row that draws a picture, a sound and a clip: none is taken for another, none is lost."""
    script = iter([LAYOUT.begin[IMAGE], LAYOUT.begin[AUDIO], 97, LAYOUT.begin[VIDEO],
                   LAYOUT.begin[AUDIO], LAYOUT.eos])
    logits = torch.eye(LAYOUT.size)
    model.text_logits = lambda *_: logits[[next(script)]]
    tokens, latents = model.generate(small.prompts("transfusion", [[]]), 40, spans=4, steps=2)
    drawn = [None if x is None else x[0] for x in latents]
    document = data.unpack(tokens[0, 1:], drawn, LAYOUT, small.TOKENIZER)
    assert [name for name, _ in document] == ["image", "audio", "text", "video", "audio"]
    contents = [content for name, content in document if name != "text"]
    for content, kind in zip(contents, (IMAGE, AUDIO, VIDEO, AUDIO)):
        assert content.shape == LAYOUT.shapes[kind] and content.abs().min() > 0
    assert not torch.equal(contents[1], contents[3])


def test_guidance_one_is_no_guidance_and_never_asks_the_null_branch(model, monkeypatch):
    prompt = small.prompts("transfusion", [[("text", "ab"), ("image", None)], [("image", None)]])

    def generate(guidance, guide):
        monkeypatch.setattr(transfusion, "guide", guide)
        torch.manual_seed(3)
        return model.generate(prompt, size=24, steps=4, guidance=guidance)

    tokens, latents = generate(1.0, None)               # None: a call would fail
    same, unguided = generate(3.0, lambda conditional, unconditional, guidance: conditional)
    assert torch.equal(tokens, same) and torch.equal(latents[IMAGE], unguided[IMAGE])
    _, guided = generate(3.0, lambda c, u, guidance: u + guidance * (c - u))
    assert not torch.equal(guided[IMAGE], unguided[IMAGE])


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_steps_along_an_exact_velocity_arrive_at_the_data(model, steps):
    x_0 = torch.randn(2, *LAYOUT.shapes[IMAGE])
    model.velocity = lambda prompt, cache, kind, x, t: (x - x_0) / t
    prompt = small.prompts("transfusion", [[("text", "a"), ("image", None)], [("image", None)]])
    _, latents = model.generate(prompt, size=16, steps=steps)
    torch.testing.assert_close(latents[IMAGE][:, 0], x_0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("likes", [(), LAYOUT.begin[1:], LAYOUT.begin[1:2], LAYOUT.begin[3:],
                                   (LAYOUT.eos,)])
@pytest.mark.parametrize("spans", [0, 1, 3])
def test_every_generated_row_is_text_and_whole_spans_that_fit(model, likes, spans):
    model.head = small.Dice(LAYOUT, likes)
    documents = [[("text", "ab")], [], [("image", 1), ("text", "xyz")],
                 [("text", "a"), ("video", 1)]]
    prompt, begun = small.prompts("transfusion", documents), []
    tokens, latents = model.generate(prompt, 26, spans, steps=1, temperature=1.0)
    for b, (row, document) in enumerate(zip(tokens.tolist(), documents)):
        start = len(naive.tokens_of(document, LAYOUT))
        assert row[:start] == naive.tokens_of(document, LAYOUT)
        kinds = small.check_grammar(row, start, 26, spans, LAYOUT,
                                    lambda kind, i: i == LAYOUT.pad)
        assert len(kinds) <= spans
        for kind in KINDS:          # in the order in which they were drawn, then nothing
            drawn = [bool(x.any()) for x in latents[kind][b]]
            assert drawn == [k < kinds.count(kind) for k in range(spans)]
        begun += kinds
    liked = {kind for kind in KINDS if LAYOUT.begin[kind] in likes}
    if liked:
        assert bool(liked & set(begun)) == (spans > 0)


def test_a_row_that_draws_leaves_the_rows_beside_it_as_they_are(model):
    documents = [[("text", "ab")], [("image", None)], [("text", "xyz"), ("audio", None)],
                 [("video", None)]]
    together, _ = model.generate(small.prompts("transfusion", documents), size=24, steps=2)
    alone, _ = model.generate(small.prompts("transfusion", documents[:1]), size=24, steps=2)
    first_span = next((i for i, token in enumerate(alone[0]) if token in LAYOUT.begin), 24)
    assert together[0, :first_span].tolist() == alone[0, :first_span].tolist()


# --- learning ------------------------------------------------------------------------------------

def test_an_untrained_model_predicts_nothing_yet():
    _, parts = small.untrained("transfusion").loss(pack())
    assert parts["text"].item() == pytest.approx(math.log(LAYOUT.size), rel=1e-6)
    for kind in KINDS:
        assert 0.5 < parts[data.MODALITIES[kind]].item() < 4        # about E |eps - x_0|^2 = 2


def test_one_batch_is_memorised():
    batch = pack(spans=small.PADDED)
    _, parts = small.memorise(small.untrained("transfusion"), batch)
    from_text = (batch.targets >= 0) & (batch.modality == 0)
    assert parts["text"] < small.floor(small.ROWS, from_text) + 0.01
    assert max(parts[data.MODALITIES[kind]] for kind in KINDS) < 0.02
