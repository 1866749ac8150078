"""mot.py: with copied weights it is the dense model; else only its routing differs, by modality."""

import math

import pytest
import torch

import naive
import small
from adapter import load

data, machine, mot = load("data"), load("machine"), load("mot")

IMAGE, AUDIO, VIDEO = KINDS = 1, 2, 3
EVERY = (0, 1, 2, 3)
PROMPTS = [[("text", "ab"), ("image", None)], [("audio", None)], [],
           [("image", 1), ("text", "what"), ("audio", 2), ("image", None)],
           [("audio", 1), ("video", 1), ("text", "x"), ("video", None)]]
TEXT = [[[("text", "only words")], [("text", "here")]], [[("text", "and here")]]]
PICTURES = [[[("text", "a"), ("image", 0)]], [[("image", 2), ("text", "bc")]]]
CLIPS = [[[("text", "a"), ("video", 0)]], [[("video", 2), ("text", "bc")]]]
SCORED = [[[("text", "a"), ("video", 0), ("audio", 1)]], [[("audio", 2)]]]

both = pytest.mark.parametrize("setting", small.SETTINGS)


def towers_of(name):
    """(name of a parameter without its copy, number of the copy or None)."""
    before, copies, after = name.partition(".copies.")
    number, _, after = after.partition(".")
    return (f"{before}.{after}", int(number)) if copies else (name, None)


def pair(setting, **options):
    """A dense host and MoT with its weights copied."""
    dense, mixture = small.model(setting), small.model(setting, EVERY, **options)
    mixture.copy_from_dense(dense)
    return dense, mixture


def losses(model, batch):
    torch.manual_seed(0)
    loss, parts = model.loss(batch)
    return {"loss": loss, **parts}


# --- the idea ------------------------------------------------------------------------------------

@pytest.mark.parametrize("towers", [(0, 1, 2, 3), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 1),
                                    (0, 0, 0, 0)])
@pytest.mark.parametrize("sizes", [(5, 3, 2, 1), (4, 0, 2, 0), (0, 3, 0, 0)])
def test_untied_against_a_loop_over_positions(towers, sizes):
    untied = small.randomise(mot.Untied(torch.nn.Linear(6, 4), towers))
    kinds = [kind for kind, size in enumerate(sizes) for _ in range(size)]
    x = torch.randn(len(kinds), 6)
    found = untied(x, sizes)
    for i, kind in enumerate(kinds):
        copy = untied.copies[towers[kind]]
        torch.testing.assert_close(found[i], copy.weight @ x[i] + copy.bias)


def test_the_copies_of_untied_start_alike_and_are_copies():
    linear = torch.nn.Linear(6, 4)
    untied = mot.Untied(linear, (0, 1, 2, 2))
    assert len(untied.copies) == 3
    for copy in untied.copies:
        assert torch.equal(copy.weight, linear.weight)
    with torch.no_grad():
        untied.copies[1].weight += 1
    assert torch.equal(untied.copies[0].weight, linear.weight)
    assert torch.equal(untied.copies[2].weight, linear.weight)


def test_permute_is_indexing_and_has_its_gradient():
    torch.manual_seed(0)
    order = torch.randperm(7)
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 2, 3, dtype=torch.float64)
    permuted = mot.Permute.apply(x, order, order.argsort())
    assert torch.equal(permuted, x[order])
    found, = torch.autograd.grad((permuted ** 2 * weight).sum(), x)
    expected, = torch.autograd.grad((x[order] ** 2 * weight).sum(), x)
    assert torch.equal(found, expected)
    assert torch.autograd.gradcheck(lambda y: mot.Permute.apply(y, order, order.argsort()), x)


# --- MoT with copied weights is the dense model --------------------------------------------------

@both
@pytest.mark.parametrize("spans", [None, small.PADDED], ids=["as many as there are", "padded"])
def test_with_copied_weights_it_is_the_dense_model(setting, spans):
    dense, mixture = pair(setting)
    batch = small.pack(setting, spans=spans)
    torch.testing.assert_close(small.hidden(mixture, batch), small.hidden(dense, batch),
                               rtol=1e-5, atol=1e-5)
    expected, found = losses(dense, batch), losses(mixture, batch)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5,
                                   equal_nan=True)


@both
def test_with_copied_weights_its_gradients_add_up_to_the_dense_models(setting):
    dense, mixture = pair(setting)
    batch, total = small.pack(setting), {}
    for model in (dense, mixture):
        losses(model, batch)["loss"].backward()
    for name, parameter in mixture.named_parameters():
        if parameter.grad is not None:
            name, _ = towers_of(name)
            total[name] = total.get(name, 0) + parameter.grad
    for name, parameter in dense.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(total.pop(name), parameter.grad, rtol=1e-4, atol=1e-5)
    assert not total


@both
def test_with_copied_weights_it_generates_what_the_dense_model_does(setting):
    dense, mixture = pair(setting)
    options = {"code_temperature": 0} if setting == "chameleon" else {"steps": 3}
    results = []
    for model in (dense, mixture):
        torch.manual_seed(0)
        prompt = small.prompts(setting, PROMPTS + small.CROSSING)
        results.append(model.generate(prompt, 40, guidance=2.0, **options))
    (tokens, latents), (same, others) = results
    assert torch.equal(tokens, same)
    for x, y in zip(latents, others):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@both
def test_an_untrained_mixture_is_the_dense_host_untrained(setting):
    dense, mixture = small.untrained(setting), small.untrained(setting, EVERY)
    weights = dense.state_dict()
    for name, value in mixture.state_dict().items():
        assert torch.equal(value, weights[towers_of(name)[0]]), name


@both
def test_it_costs_the_flops_of_the_dense_model_forward_and_backward(setting):
    batch, flops = small.pack(setting, spans=small.PADDED), []
    for model in (small.model(setting), small.model(setting, EVERY)):
        counts = []
        with machine.count_flops() as counter:
            loss = model.loss(batch)[0]
            counts.append(counter.get_total_flops())
            loss.backward()
            counts.append(counter.get_total_flops())
        flops.append(counts)
    assert flops[0] == flops[1] and flops[0][0] > 0


# --- routing by modality -------------------------------------------------------------------------

@both
@pytest.mark.parametrize("towers", [EVERY, (0, 1, 2, 1)])
@pytest.mark.parametrize("rows, present", [(TEXT, {0}), (PICTURES, {0, IMAGE}),
                                           (CLIPS, {0, VIDEO}), (SCORED, {0, AUDIO, VIDEO}),
                                           (small.ROWS, {0, IMAGE, AUDIO, VIDEO})])
def test_a_tower_gets_a_gradient_if_and_only_if_its_modality_is_in_the_batch(
        setting, rows, present, towers):
    model = small.model(setting, towers)
    losses(model, small.pack(setting, rows))["loss"].backward()
    for name, parameter in model.named_parameters():
        part, tower = towers_of(name)
        if tower in {towers[modality] for modality in present}:
            assert parameter.grad.any(), name
        elif tower is not None:     # not even zeros, from which AdamW would take a step
            assert parameter.grad is None, name


@both
@pytest.mark.parametrize("rows, present", [(TEXT, {0}), (PICTURES, {0, IMAGE}),
                                           (CLIPS, {0, VIDEO}), (SCORED, {0, AUDIO, VIDEO})])
def test_the_padding_of_spans_that_are_kept_free_gives_no_tower_a_gradient(setting, rows, present):
    model, batch = small.model(setting, EVERY), small.pack(setting, rows, small.PADDED)
    assert batch.modality.unique().tolist() == [0, IMAGE, AUDIO, VIDEO]
    losses(model, batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        tower = towers_of(name)[1]
        if tower is not None:
            assert bool(parameter.grad.any()) == (tower in present), name


def scramble(model, tower):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if towers_of(name)[1] == tower:
                parameter += torch.randn_like(parameter)


@both
def test_another_modalitys_tower_changes_nothing_for_text_alone(setting):
    model, batch = small.model(setting, EVERY), small.pack(setting, TEXT)
    before = losses(model, batch)
    for tower in KINDS:
        scramble(model, tower)
    after = losses(model, batch)
    for name in before:         # nan: of the pictures that are not there
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_changes_its_modality_and_what_sees_it_and_nothing_else(setting, kind):
    model, batch = small.model(setting, EVERY), small.pack(setting)
    before = small.hidden(model, batch)
    scramble(model, kind)
    changed, real = (small.hidden(model, batch) != before).any(-1), batch.document > 0
    seen = small.reaches(batch, whole_spans=setting == "transfusion")
    expected = (seen & (batch.modality == kind)[:, None]).any(-1)
    assert torch.equal(changed[real], expected[real])
    assert 0 < expected[real].sum() < real.sum()


@both
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_global_words_hear_of_a_span_and_it_of_them(setting, kind):
    model, name, n = small.model(setting, EVERY), data.MODALITIES[kind], small.POSITIONS[kind]
    one = small.pack(setting, [[[("text", "a"), (name, 0), ("text", "b")]]])
    word = small.pack(setting, [[[("text", "z"), (name, 0), ("text", "b")]]])
    other = small.pack(setting, [[[("text", "a"), (name, 1), ("text", "b")]]])
    hidden = [small.hidden(model, batch)[0, :n + 6] for batch in (one, word, other)]
    assert (hidden[0] != hidden[1])[3:3 + n].any(-1).all()      # the word changes the span
    assert (hidden[0] != hidden[2])[4 + n:].any(-1).all()       # the span changes what follows


@both
@pytest.mark.parametrize("towers", [EVERY, (0, 1, 2, 1)])
def test_it_draws_each_modality_after_each_as_by_a_loop_without_a_cache(setting, towers):
    naive.check_crossing(setting, small.model(setting, towers))


# --- towers and what is untied -------------------------------------------------------------------

@both
def test_towers_may_be_shared(setting):
    dense = small.model(setting)
    for towers, copies in ((EVERY, 4), ((0, 1, 2, 1), 3), ((0, 1, 2, 2), 3), ((0, 1, 1, 1), 2),
                           ((0, 0, 0, 0), 1)):
        model = small.model(setting, towers)
        numbers = {towers_of(name)[1] for name, _ in model.named_parameters()} - {None}
        assert numbers == set(range(copies))
        count = {number: 0 for number in (None, *range(copies))}
        for name, parameter in model.named_parameters():
            count[towers_of(name)[1]] += parameter.numel()
        assert len(set(count[number] for number in range(copies))) == 1
        assert count[None] + count[0] == sum(p.numel() for p in dense.parameters())


@both
@pytest.mark.parametrize("towers, expected", [((0, 1, 2, 1), [True, False, True]),
                                              ((0, 1, 2, 2), [False, True, True]),
                                              (EVERY, [False, False, True])])
def test_modalities_that_share_a_tower_are_changed_together(setting, towers, expected):
    """Scrambling the tower of clips changes pictures, sounds and clips alone: who is changed."""
    model = small.model(setting, towers)
    batches = [small.pack(setting, [[[(name, 0)]]]) for name in data.MODALITIES[1:]]
    before = [small.hidden(model, batch) for batch in batches]
    scramble(model, towers[VIDEO])
    found = [not torch.equal(small.hidden(model, batch), x) for batch, x in zip(batches, before)]
    assert found == expected


@both
@pytest.mark.parametrize("names, towers, of_kind", [
    ((), EVERY, [0, 0, 0, 0]), (("image",), EVERY, [0, 1, 0, 0]), (("video",), EVERY, [0, 0, 0, 1]),
    (("image", "video"), EVERY, [0, 1, 0, 2]), (("audio", "video"), (0, 1, 2, 1), [0, 0, 2, 1]),
    (("image", "audio"), EVERY, [0, 1, 2, 0]), (("video",), (0, 1, 2, 0), [0, 0, 0, 0])])
def test_a_layout_may_lack_modalities_and_their_towers_are_left_out(
        setting, names, towers, of_kind):
    layout = small.layout_of(setting, names)
    rows = [[[("text", "go"), *((name, n) for name in names)] for n in range(2)],
            [[(name, 2), ("text", "x")] for name in names]]
    batch = small.pack(setting, rows, layout=layout)
    dense = small.randomise(small.untrained(setting, layout=layout))
    mixture = small.randomise(small.untrained(setting, towers, layout))
    numbers = {towers_of(name)[1] for name, _ in mixture.named_parameters()} - {None}
    assert numbers == set(of_kind)
    own = [kind for kind in range(4) if kind == 0 or data.MODALITIES[kind] in names]
    for module in mixture.modules():
        if isinstance(module, mot.Untied):
            assert [module.towers[kind] for kind in own] == [of_kind[kind] for kind in own]
    with torch.no_grad():
        mixture.head.weight[layout.eos] = 0         # rows are full, one after another
    naive.check(setting, mixture, [[("text", "ab")], [("text", "abcdef")], [],
                                   *([(name, None)] for name in names)])
    mixture.copy_from_dense(dense)
    expected, found = losses(dense, batch), losses(mixture, batch)
    assert expected.keys() == found.keys() and expected["loss"].isfinite()
    assert set(expected) & set(data.MODALITIES) == {"text", *names}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5,
                                   equal_nan=True)


@both
def test_with_one_tower_for_all_it_is_a_dense_model(setting):
    model, dense = small.model(setting, (0, 0, 0, 0)), small.untrained(setting)
    weights = {towers_of(name)[0]: value for name, value in model.state_dict().items()}
    dense.load_state_dict(weights)
    batch = small.pack(setting)
    torch.testing.assert_close(small.hidden(model, batch), small.hidden(dense.eval(), batch),
                               rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("untie, expected", [
    (("ffn",), {"ffn"}), (("attention",), {"attention"}),
    (("norm",), {"attention_norm", "ffn_norm", "norm"}), ((), set())])
def test_untie_unties_that_part_alone(setting, untie, expected):
    dense, model = pair(setting, untie=untie)
    untied = {name.split(".")[2 if name.startswith("blocks.") else 0]
              for name, _ in model.named_parameters() if towers_of(name)[1]}
    assert untied == expected
    batch = small.pack(setting)
    torch.testing.assert_close(small.hidden(model, batch), small.hidden(dense, batch),
                               rtol=1e-5, atol=1e-5)


@both
def test_only_non_embedding_weights_are_untied(setting):
    tied = {towers_of(name)[0].split(".")[0]
            for name, _ in small.model(setting, EVERY).named_parameters()
            if towers_of(name)[1] is None}
    assert {"token_embedding", "head"} <= tied
    assert not tied & {"blocks", "norm"}


# --- learning ------------------------------------------------------------------------------------

@both
def test_one_batch_is_memorised(setting):
    batch = small.pack(setting, spans=small.PADDED)
    loss, parts = small.memorise(small.untrained(setting, EVERY), batch)
    is_text = (batch.targets >= 0) & (batch.targets < small.LAYOUT[setting].first_code)
    if setting == "transfusion":            # a latent says nothing of what follows it
        is_text &= batch.modality == 0
    assert parts["text"] < small.floor(small.ROWS, is_text) + 0.01
    assert max(parts[data.MODALITIES[kind]] for kind in KINDS) < 0.02
    assert math.isfinite(loss)
