"""chameleon.py: mask, state machine and cache against loops; generation against no cache."""

import math

import pytest
import torch

import naive
import small
from adapter import load

chameleon, data = load("chameleon"), load("data")

LAYOUT = small.LAYOUT["chameleon"]
IMAGE, AUDIO, VIDEO = KINDS = 1, 2, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return small.model("chameleon")


def pack(*args, **options):
    return small.pack("chameleon", *args, **options)


def is_code(kind, i):
    return i in range(*LAYOUT.codes[kind])


# --- the idea ------------------------------------------------------------------------------------

def test_attention_mask_against_a_triple_loop():
    batch = pack(spans=small.PADDED)
    mask = chameleon.attention_mask(batch.document)
    assert mask.shape == (2, 1, small.LENGTH, small.LENGTH)
    assert torch.equal(mask[:, 0], small.reaches(batch, whole_spans=False))


def test_z_loss_and_its_gradient_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 4.0]], dtype=torch.float64,
                          requires_grad=True)
    log_z = [math.log(3), math.log(math.e + math.e ** 2 + math.e ** 4)]
    loss = chameleon.z_loss(logits)
    assert loss.tolist() == pytest.approx([z ** 2 for z in log_z])
    loss.sum().backward()
    for row, z, gradient in zip(logits.tolist(), log_z, logits.grad.tolist()):
        assert gradient == pytest.approx([2 * z * math.exp(logit - z) for logit in row])


def test_replace_codes_replaces_the_share_it_is_told_by_any_code():
    tokens, codes = torch.full((2, 20_000), 7), (300, 304)
    share = torch.tensor([[0.0], [0.25]])
    seen = chameleon.replace_codes(tokens, share, codes)
    assert torch.equal(seen[0], tokens[0])
    strange = seen[1][seen[1] != 7]
    assert len(strange) / 20_000 == pytest.approx(0.25, abs=0.02)
    assert torch.bincount(strange - 300, minlength=4) / len(strange) == pytest.approx(0.25, abs=.03)


def test_codes_are_replaced_in_training_where_no_words_follow(model):
    batch = pack(spans=small.PADDED)
    code, differs = (batch.modality > 0) & (batch.document > 0), 0
    for _ in range(200):
        seen = model.noisy(batch)
        assert torch.equal(seen[batch.modality == 0], batch.tokens[batch.modality == 0])
        for kind in KINDS:
            assert all(is_code(kind, i) for i in seen[code & (batch.modality == kind)].tolist())
        differs = differs + (seen != batch.tokens).float()
    shown = torch.zeros_like(code).flatten()
    for kind in KINDS:
        where = batch.order[sum(batch.sizes[:kind]):sum(batch.sizes[:kind + 1])]
        shown[where] = batch.shown[kind].repeat_interleave(small.POSITIONS[kind])
    shown = shown.view(code.shape) & code
    assert not differs[shown].any()
    counts = torch.tensor([1, *small.CODES["chameleon"].values()])      # by modality
    expected = 0.3 * (1 - 1 / counts)       # a share of 0 to 0.6, of which one code is the same
    for kind in KINDS:
        mine = batch.modality == kind
        assert (mine & shown).any() and (mine & code & ~shown).any()
        found = differs[mine & code & ~shown].mean() / 200
        assert found == pytest.approx(expected[kind].item(), abs=0.05)
    found, expected = (x[code & ~shown].mean() for x in (differs / 200, expected[batch.modality]))
    assert found.item() == pytest.approx(expected.item(), abs=0.02)


def test_the_loss_replaces_codes_in_training_only(model, monkeypatch):
    batch, calls = pack(), []
    monkeypatch.setattr(model, "noisy", lambda batch: calls.append(1) or batch.tokens)
    model.eval().loss(batch)
    assert not calls
    model.train().loss(batch)
    assert calls


def test_guide_goes_beyond_the_conditional_by_its_distance_from_the_unconditional():
    c, u = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    for guidance, expected in ((1, [3.0, 1.0]), (0, [1.0, 2.0]), (3, [7.0, -1.0])):
        assert chameleon.guide(c, u, guidance).tolist() == expected


def test_allow_against_a_loop_over_rows_and_ids():
    states = [(kind, left, room) for kind, most in enumerate(small.POSITIONS)
              for left in range(most + 1) for room in range(1, 9)]
    logits = torch.randn(len(states), LAYOUT.size)
    found = chameleon.allow(logits, LAYOUT, *map(torch.tensor, zip(*states)))
    for row, before, (kind, left, room) in zip(found, logits, states):
        for i in range(LAYOUT.size):
            if kind:
                allowed = is_code(kind, i) if left else i == LAYOUT.end[kind]
            else:
                allowed = i < LAYOUT.text or i == LAYOUT.eos or any(
                    i == LAYOUT.begin[k] and room >= small.POSITIONS[k] + 2 for k in KINDS)
            assert row[i] == (before[i] if allowed else -math.inf)


def test_choose_is_greedy_at_zero_and_else_samples_by_the_softmax():
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf]]).expand(20_000, 3)
    assert (chameleon.choose(logits, 0) == 1).all()
    for temperature, share in ((1.0, 3 / 4), (0.5, 9 / 10)):
        chosen = chameleon.choose(logits, temperature)
        error = 3 * (share * (1 - share) / len(chosen)) ** 0.5
        assert (chosen == 1).float().mean().item() == pytest.approx(share, abs=error)
        assert not (chosen == 2).any()


def test_codes_begin_near_each_other_where_their_vectors_are():
    codebook, model = torch.randn(8, 3), small.untrained("chameleon")
    codebook[5] = codebook[2] + 0.01
    weights = [weight.detach() for weight in (model.token_embedding.weight, model.head.weight)]
    before = [weight.clone() for weight in weights]
    model.start_codes(IMAGE, codebook)
    first, last = LAYOUT.codes[IMAGE]
    for old, new in zip(before, weights):
        apart = torch.cdist(new[first:last], new[first:last])
        assert 0 < apart[2, 5] < apart[2, [0, 1, 3, 4, 6, 7]].min()
        changed = (old != new).all(1)
        assert changed[first:last].all() and changed.sum() == last - first
    seen = weights[0]
    assert seen[first:last].std() == pytest.approx(seen[:first].std().item(), rel=0.2)


def test_places_begin_near_each_other_where_they_are():
    h, w = 32, 4                        # of a clip: eight frames, one below the other, 4 x 4 each
    places = torch.stack([chameleon.start_places(h, w, 128).view(h, w, -1) for _ in range(20)])
    assert places.std() == pytest.approx(0.5, rel=0.05)

    def alike(a, b):
        return torch.cosine_similarity(a, b, dim=-1).mean().item()
    below, beside = (alike(places, places.roll(1, axis)) for axis in (1, 2))
    assert alike(places, places) > below > alike(places, places.roll((2, 1), (1, 2))) + 0.1
    assert beside > alike(places, places.roll((1, 2), (1, 2))) + 0.1
    assert alike(places, places.roll(4, 1)) > alike(places, places.roll(6, 1)) + 0.1


def test_a_place_begins_as_its_row_and_column():
    layout = small.TOKENIZER.layout({"image": (2, 8, 8)}, {"image": 8})
    model = small.untrained("chameleon", layout=layout)
    grid = model.place_embedding.weight[1:].detach().view(8, 8, -1)
    rest = grid - grid.mean(0) - grid.mean(1, keepdim=True) + grid.mean((0, 1))
    # of noise alone rows and columns would leave 49 of 63 parts, of this beginning 0.8 x 0.16
    assert rest.square().sum() / (grid - grid.mean((0, 1))).square().sum() < 0.25


# --- who sees whom -------------------------------------------------------------------------------

def test_what_stands_at_j_changes_what_follows_it_in_its_document_and_nothing_else(model):
    batch = pack()
    before, reaches = small.hidden(model, batch), small.reaches(batch, whole_spans=False)
    for b in range(2):
        for j in range(small.LENGTH):
            if batch.document[b, j]:
                tokens = batch.tokens.clone()
                tokens[b, j] = (tokens[b, j] + 1) % LAYOUT.size
                changed = (small.hidden(model, batch._replace(tokens=tokens)) != before).any(-1)
                assert torch.equal(changed[b], reaches[b, :, j]) and not changed[1 - b].any()


def test_documents_packed_together_are_as_if_alone(model):
    batch = pack()
    together = small.hidden(model, batch)
    for b, row in enumerate(small.ROWS):
        for number, document in enumerate(row, 1):
            alone = pack([[document]])
            torch.testing.assert_close(
                together[b, batch.document[b] == number],
                small.hidden(model, alone)[0, alone.document[0] > 0], rtol=1e-5, atol=1e-5)


def test_queries_and_keys_are_normalised_over_each_head(model):
    x, attention = torch.randn(1, 5, 32), model.blocks[0].attention
    rope = chameleon.rotary(torch.arange(5)[None], 16, 1e4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        once = attention(x, rope, mask)
        attention.qkv.weight[:64] *= 3              # q and k three times as long: no change
        torch.testing.assert_close(attention(x, rope, mask), once, rtol=1e-5, atol=1e-4)


def test_attention_by_hand_normalises_each_head_of_q_and_k_then_rotates_then_attends(model):
    attention, D, h = model.blocks[0].attention, 32, 16
    for norm in (attention.q_norm, attention.k_norm):       # a norm that does not commute with RoPE
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, positions = torch.randn(2, 5, D), torch.tensor([[6, 7, 8, 9, 10], [41, 42, 43, 44, 45]])
    mask = chameleon.attention_mask(torch.tensor([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]))
    with torch.no_grad():
        found = attention(x, chameleon.rotary(positions, h, 1e4), mask)
    weight = {name: parameter.detach().double() for name, parameter in attention.named_parameters()}

    def normalised(y, name):                                # y (S, h): one head
        mean = y.sum(-1, keepdim=True) / h
        variance = ((y - mean) ** 2).sum(-1, keepdim=True) / h
        y = (y - mean) / (variance + 1e-5).sqrt()
        return y * weight[name + ".weight"] + weight[name + ".bias"]

    heads = torch.zeros(2, 5, D, dtype=torch.float64)
    for b in range(2):
        for start in range(0, D, h):
            q, k, v = (x[b].double() @ weight["qkv.weight"][part + start:part + start + h].T
                       for part in (0, D, 2 * D))           # (S, h)
            q, k = (small.turned(normalised(y, name), positions[b], 1e4)
                    for y, name in ((q, "q_norm"), (k, "k_norm")))
            shares = (q @ k.T / h ** 0.5).masked_fill(~mask[b, 0], -math.inf).softmax(-1)
            heads[b, :, start:start + h] = shares @ v
    expected = heads @ weight["out.weight"].T
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_each_modality_has_places_of_its_own_and_text_has_none(model, monkeypatch):
    batch, looked_up, embed = pack(), [], model.place_embedding.forward
    monkeypatch.setattr(model.place_embedding, "forward",
                        lambda places: looked_up.append(places) or embed(places))
    model(batch)
    for kind, places in enumerate(([0], range(1, 5), range(5, 7), range(7, 15))):
        assert set(looked_up[0][batch.modality == kind].tolist()) == set(places)
    assert model.place_embedding.num_embeddings == 15


# --- the loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("shown_weight, text_only_weight", [(1.0, 1.0), (0.3, 3.0)])
def test_the_loss_against_a_loop_over_positions(shown_weight, text_only_weight):
    model = small.model("chameleon", shown_weight=shown_weight, text_only_weight=text_only_weight)
    batch = pack(spans=small.PADDED)
    opening = {(0, 2), (0, 4), (1, 1)}          # of small.ROWS: row and number of such a span
    loss, parts = model.loss(batch)
    logits = model.head(model(batch)).double()
    errors, losses = {name: [] for name in data.MODALITIES}, []
    z, right, weights = [], [], []
    for b in range(2):
        for i in range(small.LENGTH - 1):
            if batch.document[b, i] == batch.document[b, i + 1] > 0:
                following = batch.tokens[b, i + 1].item()
                name = data.MODALITIES[batch.modality[b, i + 1]]
                errors[name].append(-logits[b, i].log_softmax(-1)[following].item())
                z.append(logits[b, i].logsumexp(-1).item() ** 2)
                reading = any((b, batch.span[b, j].item()) in opening for j in range(i + 1)
                              if batch.document[b, j] == batch.document[b, i])
                shown = (b, batch.span[b, i + 1].item()) in opening
                alone = batch.tokens[b, i] != model.layout.bos and not any(
                    batch.span[b, j] > 0 for j in range(small.LENGTH)
                    if batch.document[b, j] == batch.document[b, i])
                weights.append((8 if reading else text_only_weight if alone else 1)
                               if name == "text" else shown_weight if shown else 1)
                losses.append(errors[name][-1])
                if name == "text":
                    right.append(logits[b, i].argmax().item() == following)
    for name in errors:
        mean = sum(errors[name]) / len(errors[name])
        assert parts[name].item() == pytest.approx(mean, rel=1e-5)
    assert parts["text_accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert parts["log_z_squared"].item() == pytest.approx(sum(z) / len(z), rel=1e-5)
    assert set(weights) == {8, 1, shown_weight, text_only_weight}
    expected = sum(w * (loss_i + 1e-5 * z_i) for w, loss_i, z_i in zip(weights, losses, z))
    assert loss.item() == pytest.approx(expected / sum(weights), rel=1e-5)


def test_the_z_loss_is_weighed_by_the_config():
    batch = pack()
    light, heavy = (small.model("chameleon", z_loss=weight, reading_weight=1.0)
                    for weight in (1e-5, 0.5))
    (light_loss, parts), (heavy_loss, _) = light.loss(batch), heavy.loss(batch)
    torch.testing.assert_close(heavy_loss - light_loss, (0.5 - 1e-5) * parts["log_z_squared"])


def test_padding_does_not_change_the_loss(model):
    loss, parts = model.loss(pack())
    again, same = model.loss(pack(spans=small.PADDED, length=small.LENGTH + 4))
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    for name in parts:
        torch.testing.assert_close(parts[name], same[name], rtol=1e-6, atol=1e-6)


# --- the cache -----------------------------------------------------------------------------------

def test_cached_equals_uncached_for_text_and_across_spans_in_rows_of_other_lengths(model):
    documents = [[("text", "ab"), ("image", 0), ("text", "xy")],
                 [("image", 1), ("text", "abcd"), ("image", 2), ("text", "zz")],
                 [("audio", 1), ("text", "xyz.")],
                 [("text", "a"), ("video", 1), ("audio", 2), ("text", "x")]]
    batch, starts = pack([[document] for document in documents], finished=False), [3, 9, 1, 2]
    expected = small.hidden(model, batch)
    with torch.no_grad():
        cache = chameleon.Cache(4, small.LENGTH, "cpu")
        model(pack([[document] for document in documents], finished=False), cache)
        cache.lengths += torch.tensor(starts)       # of each row only so much is kept
        for step in range(10):
            at = torch.tensor(starts) + step
            last, kind, place = (x.gather(1, at[:, None])[:, 0]
                                 for x in (batch.tokens, batch.modality, batch.place))
            model.extend(batch, cache, (last + 1) % 256, kind, place * 0)       # not kept
            found = model.extend(batch, cache, last, kind, place)
            cache.lengths += 1
            for b in range(4):
                if batch.document[b, at[b]]:
                    torch.testing.assert_close(found[b], expected[b, at[b]], rtol=1e-5, atol=1e-5)


def test_a_doubled_cache_has_each_row_once_more_and_keeps_its_first_position(model):
    batch = pack([[[("text", "ab")]], [[("text", "wxyz")]]], finished=False)
    alone = pack([[[]], [[]]], finished=False)                          # <bos>, and nothing else
    last, zero = torch.tensor([97, 98]), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        expected = []
        for prompt in (batch, alone):
            cache = chameleon.Cache(2, small.LENGTH + 1, "cpu")
            model(prompt, cache)
            cache.lengths += (prompt.document > 0).sum(1)
            expected += [model.extend(prompt, cache, last, zero, zero)]
            if prompt is batch:
                cache.double()
                found = model.extend(prompt, cache, last, zero, zero)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


# --- generation ----------------------------------------------------------------------------------

PROMPTS = [[("text", "ab"), ("image", None)], [("audio", None)], [],
           [("image", 1), ("text", "what"), ("audio", 2), ("image", None)],
           [("video", 1), ("text", "x"), ("video", None)]]


def rows_of(batch):
    return [row[:length].tolist() for row, length in
            zip(batch.tokens, (batch.document > 0).sum(1))]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("spans", [0, 1, 3])
def test_greedy_text_and_codes_are_those_of_a_loop_without_a_cache(model, guidance, spans):
    with torch.no_grad():           # begin spans often
        model.head.weight[list(LAYOUT.begin[1:])] *= 5.0
    kinds = naive.check_codes(model, PROMPTS, 40, spans, guidance)
    assert max(map(len, kinds)) == spans
    assert spans < 3 or max(len(set(row)) for row in kinds) > 1     # not all of one modality


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_each_modality_is_drawn_after_each_as_by_a_loop_without_a_cache(model, guidance):
    naive.check_crossing("chameleon", model, guidance)


def test_guidance_one_is_no_guidance_and_never_asks_the_null_branch(model, monkeypatch):
    prompt = small.prompts("chameleon", PROMPTS)

    def generate(guidance, guide):
        monkeypatch.setattr(chameleon, "guide", guide)
        torch.manual_seed(3)
        return model.generate(prompt, 30, guidance=guidance)[0]

    unguided = generate(1.0, None)                      # None: a call would fail
    assert torch.equal(unguided, generate(3.0, lambda c, u, guidance: c))
    assert not torch.equal(unguided, generate(3.0, lambda c, u, guidance: u + guidance * (c - u)))


def test_guidance_changes_codes_never_the_text(model):
    prompt = small.prompts("chameleon", [[("text", "ab")], [], [("image", 1), ("text", "x")]])
    one, three = (model.generate(prompt, 30, spans=0, guidance=guidance)[0] for guidance in (1, 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("likes", [(), LAYOUT.begin[1:], LAYOUT.begin[1:2], LAYOUT.begin[3:],
                                   (LAYOUT.eos,), range(*LAYOUT.codes[AUDIO])])
@pytest.mark.parametrize("spans", [0, 1, 3])
def test_every_generated_row_is_text_and_whole_spans_that_fit(model, likes, spans):
    model.head = small.Dice(LAYOUT, likes)
    prompt = small.prompts("chameleon", [[("text", "ab")], [], [("image", 1), ("text", "xyz")],
                                         [("text", "a"), ("video", 1)]])
    tokens, begun = model.generate(prompt, 30, spans, temperature=1.0)[0], []
    for row, start in zip(tokens.tolist(), rows_of(prompt)):
        assert row[:len(start)] == start
        kinds = small.check_grammar(row, len(start), 30, spans, LAYOUT, is_code)
        assert len(kinds) <= spans
        begun += kinds
    liked = {kind for kind in KINDS if LAYOUT.begin[kind] in likes}
    if liked:
        assert bool(liked & set(begun)) == (spans > 0)


def test_rows_do_not_change_one_another(model):
    together = model.generate(small.prompts("chameleon", PROMPTS), 36, code_temperature=0)[0]
    for row, document in zip(together, PROMPTS):
        prompt = small.prompts("chameleon", [document])
        assert torch.equal(row, model.generate(prompt, 36, code_temperature=0)[0][0])


# --- learning ------------------------------------------------------------------------------------

def test_an_untrained_model_predicts_nothing_yet():
    _, parts = small.untrained("chameleon").loss(pack())
    for name in data.MODALITIES:
        assert parts[name].item() == pytest.approx(math.log(LAYOUT.size), rel=1e-6)


def test_one_batch_is_memorised():
    batch = pack(spans=small.PADDED)
    _, parts = small.memorise(small.untrained("chameleon"), batch)
    is_text = (batch.targets >= 0) & (batch.targets < LAYOUT.first_code)
    assert parts["text"] < small.floor(small.ROWS, is_text) + 0.01
    assert max(parts[data.MODALITIES[kind]] for kind in KINDS) < 0.01
