"""vqvae.py: both bottlenecks against loops and gradients by hand; the autoencoder around them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from adapter import load

autoencoders, train, vqvae = load("autoencoders"), load("train"), load("vqvae")
shapes, tones = load("worlds.shapes"), load("worlds.tones")

SMALL = vqvae.VQVAEConfig(widths=(16, 32), blocks=1, latent_channels=4, codes=32)
BOTTLENECKS = ("vq", "kl")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([shapes.render(shapes.sample(rng), rng) for _ in range(8)]))


def small(bottleneck, **fields):
    return vqvae.VQVAE(dataclasses.replace(SMALL, bottleneck=bottleneck, **fields))


def fitted(bottleneck, pictures, **fields):
    """A model in eval mode whose codebook has seen one batch."""
    model = small(bottleneck, **fields).train()
    model.loss(pictures)
    return model.eval()


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same(some, others):
    assert some.keys() == others.keys()
    for name in some:
        torch.testing.assert_close(some[name], others[name], rtol=0, atol=0,
                                   msg=lambda text, name=name: f"{name}: {text}")


# --- the ideas -----------------------------------------------------------------------------------

def test_quantize_finds_the_nearest_code_as_a_loop_does():
    z_e, codebook = torch.randn(2, 3, 5, 4), torch.randn(17, 4)
    codes, z_q = vqvae.quantize(z_e, codebook)
    assert codes.shape == (2, 3, 5) and codes.dtype == torch.int64
    for index in np.ndindex(2, 3, 5):
        distance = [sum((a - b) ** 2 for a, b in zip(z_e[index].tolist(), code))
                    for code in codebook.tolist()]
        assert codes[index] == min(range(17), key=distance.__getitem__)
        assert torch.equal(z_q[index], codebook[codes[index]])


def test_straight_through_has_the_value_of_z_q_and_the_gradient_of_z_e():
    z_e = torch.tensor([0.5, -1.0, 3.0], requires_grad=True)
    z_q = torch.tensor([1.0, -2.0, 2.5], requires_grad=True)
    out = vqvae.straight_through(z_e, z_q)
    assert torch.equal(out, z_q)
    out.square().sum().backward()
    assert z_e.grad.tolist() == [2.0, -4.0, 5.0]        # 2 z_q: at the value of z_q, given to z_e
    assert z_q.grad is None or not z_q.grad.any()


def test_ema_codebook_is_the_loop_of_the_paper():
    z_e = torch.tensor([[1.0, 2.0], [3.0, 5.0], [-4.0, 0.5]])
    codes, decay = torch.tensor([0, 0, 2]), 0.75
    count, total = [1.0, 2.0, 0.5], [[1.0, 1.0], [2.0, -2.0], [0.0, 4.0]]
    new_count, new_total = vqvae.ema_codebook(
        z_e, codes, torch.tensor(count), torch.tensor(total), decay)
    for k in range(3):
        mine = [z for z, code in zip(z_e.tolist(), codes.tolist()) if code == k]
        assert new_count[k] == decay * count[k] + (1 - decay) * len(mine)
        for c in range(2):
            assert new_total[k, c] == decay * total[k][c] + (1 - decay) * sum(z[c] for z in mine)


def test_kl_to_unit_gaussian_is_that_of_torch_distributions():
    mean, log_variance = 3 * torch.randn(2, 500, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(vqvae.kl_to_unit_gaussian(mean, log_variance), expected)


@pytest.mark.parametrize("codes, perplexity, share", [
    (torch.arange(16).repeat(3).view(3, 4, 4), 16, 1),      # uniform: as many as there are
    (torch.full((2, 4, 4), 7), 1, 1 / 16),                  # a single one
    (torch.tensor([3, 15]), 2, 2 / 16),
    (torch.tensor([0, 0, 0, 1]), 4 / 3 ** 0.75, 2 / 16),    # exp of the entropy of (3/4, 1/4)
])
def test_code_usage_on_known_codes(codes, perplexity, share):
    assert vqvae.code_usage(codes, 16) == pytest.approx((perplexity, share))


# --- the discrete bottleneck ---------------------------------------------------------------------

def bottleneck_with(codebook, **fields):
    """A codebook bottleneck in training mode, each of its codes alive."""
    K, C = codebook.shape
    config = dataclasses.replace(SMALL, codes=K, latent_channels=C, **fields)
    bottleneck = vqvae.CodebookBottleneck(config).train()
    bottleneck.codebook.copy_(codebook)
    bottleneck.total.copy_(codebook)
    bottleneck.count.fill_(1)
    return bottleneck


def test_both_gradients_at_z_e_are_those_found_by_hand():
    z_e = torch.tensor([0.9, 0.7]).view(1, 2, 1, 1).requires_grad_()
    bottleneck = bottleneck_with(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), commitment=0.25)
    z_q, penalty, _ = bottleneck(z_e)                       # the nearest code is (1, 1)
    reconstruction = (z_q.flatten() @ torch.tensor([2.0, -3.0])) ** 2   # decoder (2, -3), target 0
    through, = torch.autograd.grad(reconstruction, z_e, retain_graph=True)
    # 2 (2 - 3) (2, -3): taken at z_q, and handed to z_e as it is
    torch.testing.assert_close(through.flatten(), torch.tensor([-4.0, 6.0]))
    commitment, = torch.autograd.grad(penalty, z_e)
    # 0.25 * 2 (z_e - z_q) / 2 elements
    torch.testing.assert_close(commitment.flatten(), torch.tensor([-0.025, -0.075]))


def test_reconstruction_gradient_passes_the_quantizer_as_if_it_were_the_identity(pictures):
    model = fitted("vq", pictures, commitment=0.0)
    weights = list(model.encoder.parameters())
    found = torch.autograd.grad(model.loss(pictures)[0], weights)

    z_e = model.encoder(pictures)
    z_q = model.bottleneck.codebook[model.encode(pictures)].permute(0, 3, 1, 2).requires_grad_()
    at_z_q, = torch.autograd.grad((model.decoder(z_q) - pictures).square().mean(), z_q)
    expected = torch.autograd.grad(z_e, weights, grad_outputs=at_z_q)
    assert at_z_q.any()
    torch.testing.assert_close(found, expected)


def test_commitment_gradient_reaches_the_encoder_and_nothing_else(pictures):
    model = fitted("vq", pictures)
    model.bottleneck(model.encoder(pictures))[1].backward()
    assert model.encoder[-1].weight.grad.any()
    assert all(weight.grad is None for weight in model.decoder.parameters())
    assert list(model.bottleneck.parameters()) == []


def test_a_training_step_moves_each_code_to_the_running_mean_of_what_chose_it():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0], [-9.0, 9.0]])
    bottleneck = bottleneck_with(codebook, codebook_decay=0.5)
    z_e = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    bottleneck(z_e.T.reshape(1, 2, 2, 2))
    # counts (1 + 2) / 2, (1 + 2) / 2, 1 / 2; a code that nothing chose stays where it is
    expected = torch.tensor([[1 / 3, 2 / 3], [12 / 3, 14 / 3], [-9.0, 9.0]])
    torch.testing.assert_close(bottleneck.codebook, expected)


def test_dead_codes_restart_at_encoder_outputs_and_live_ones_stay():
    bottleneck = bottleneck_with(torch.randn(8, 4), dead_below=0.1)
    bottleneck.count.copy_(torch.tensor([0, 0.09, 0.11, 1, 5, 0, 0.5, 0.01]))
    dead = bottleneck.count < 0.1
    before, z_e = buffers(bottleneck), torch.randn(20, 4)
    bottleneck.revive(z_e)
    for name, buffer in bottleneck.named_buffers():
        assert torch.equal(buffer[~dead], before[name][~dead])
    for code in bottleneck.codebook[dead]:
        assert (code == z_e).all(1).any()
    assert len(bottleneck.codebook[dead].unique(dim=0)) > 1
    revived = bottleneck.total[dead] / bottleneck.count[dead, None]
    torch.testing.assert_close(revived, bottleneck.codebook[dead])
    assert (bottleneck.count >= 0.1).all()


def test_dead_codes_restart_where_all_codes_are_far():
    """One code lies in what nearly all outputs are, plain background: no other one goes there."""
    bottleneck = bottleneck_with(torch.zeros(8, 4), dead_below=0.1)
    bottleneck.count.copy_(torch.tensor([1.0] + [0.0] * 7))
    things = torch.randn(20, 4) + 5
    bottleneck.revive(torch.cat([1e-4 * torch.randn(980, 4), things]))
    for code in bottleneck.codebook[1:]:
        assert (code == things).all(1).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_outputs_that_are_not_finite_are_left_to_the_trainer_to_explain(value):
    bottleneck_with(torch.zeros(8, 4), dead_below=0.1).revive(torch.full((20, 4), value))


def test_the_first_batch_in_training_places_every_code(pictures):
    model = fitted("vq", pictures)
    z_e = model.encoder(pictures).permute(0, 2, 3, 1).flatten(0, 2)
    codebook = model.bottleneck.codebook
    rounding = 1e-6                     # of means of outputs, of which some are the outermost
    assert (codebook >= z_e.min(0).values - rounding).all()
    assert (codebook <= z_e.max(0).values + rounding).all()
    assert len(codebook.unique(dim=0)) > 1


def test_codebook_stays_fp32_under_bf16_autocast(pictures):
    model = small("vq").train()
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(pictures)[0].backward()
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_codes_and_codebook_do_not_lose_precision_under_bf16_autocast():
    z_e, codebook, results = torch.randn(16, 4, 8, 8), torch.randn(32, 4), []
    for enabled in (False, True):
        bottleneck = bottleneck_with(codebook)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z_q = bottleneck(z_e)[0]
        results.append({"z_q": z_q, **buffers(bottleneck)})
    assert_same(*results)


# --- the continuous bottleneck -------------------------------------------------------------------

def test_gaussian_bottleneck_samples_in_training_and_gives_the_mean_afterwards():
    bottleneck = vqvae.GaussianBottleneck(SMALL)
    moments = torch.tensor([3.0, math.log(4)]).repeat_interleave(4).view(1, 8, 1, 1)
    moments = moments.expand(4, 8, 100, 100)                # mean 3, deviation 2
    z = bottleneck.train()(moments)[0]
    error = 2 / math.sqrt(z.numel())                        # the standard error of the mean
    assert abs(z.mean() - 3) < 4 * error and abs(z.std() - 2) < 4 * error
    z, penalty, _ = bottleneck.eval()(moments)
    assert torch.equal(z, moments[:, :4])
    kl = 0.5 * (9 + 4 - 1 - math.log(4))
    assert penalty.item() == pytest.approx(SMALL.kl_weight * kl)


def test_the_decoder_learns_from_noise_of_a_strength_drawn_for_each_picture():
    """Up to `latent_noise` of the deviation that each channel has over the batch."""
    bottleneck = vqvae.GaussianBottleneck(dataclasses.replace(SMALL, latent_noise=0.3)).train()
    deviation = torch.tensor([1.0, 10.0]).view(2, 1, 1)
    mean = deviation * torch.randn(400, 2, 20, 20)
    moments = torch.cat([mean, torch.full_like(mean, -20)], 1).requires_grad_()
    z = bottleneck(moments)[0]
    noise = (z - mean) / deviation
    assert abs(noise.mean()) < 4 * 0.3 / math.sqrt(noise.numel())
    strength = noise.std((2, 3))                            # (picture, channel)
    torch.testing.assert_close(strength[:, 0], strength[:, 1], rtol=0.25, atol=0.005)
    mine = strength.mean(1).sort().values                   # uniform from 0 to 0.3
    torch.testing.assert_close(mine, torch.linspace(0, 0.3, 400), rtol=0, atol=0.03)
    z.sum().backward()                                      # noise leads no gradient to the mean
    assert torch.equal(moments.grad[:, :2], torch.ones_like(mean))


def test_fit_scale_gives_unit_variance_per_channel_and_changes_no_reconstruction(pictures):
    model = small("kl").eval()
    before = model(pictures)
    for _ in range(2):                                      # the second time there is nothing to do
        model.fit_scale(pictures)
        latents = model.encode(pictures)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(model(pictures), before, rtol=0, atol=1e-5)


# --- the autoencoder -----------------------------------------------------------------------------

@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("signal, grid", [
    ({}, (8, 8)),
    ({"channels": 1, "size": (128, 32), "strides": ((4, 2), (4, 2))}, (8, 8)),     # a spectrogram
    ({"size": (48, 32), "strides": ((2, 2), (2, 2), (2, 4)), "widths": (8, 8, 8)}, (6, 2)),
])
def test_encode_gives_the_grid_of_the_config_and_decode_the_signal_back(bottleneck, signal, grid):
    model = small(bottleneck, **signal).eval()
    config = model.config
    signals = torch.randn(2, config.channels, *config.size).clamp(-1, 1)
    encoded, decoded = model.encode(signals), model(signals)
    assert config.grid == grid
    if bottleneck == "vq":
        assert encoded.shape == (2, *grid) and encoded.dtype == torch.int64
    else:
        assert encoded.shape == (2, config.latent_channels, *grid)
        assert encoded.dtype == torch.float32
    assert decoded.shape == signals.shape


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
@pytest.mark.parametrize("kind, channels, grid", [("image", 3, (8, 8)), ("audio", 1, (8, 8)),
                                                  ("video", 3, (4, 4))])
def test_those_that_train_makes_have_64_positions_or_fewer(bottleneck, kind, channels, grid):
    config = autoencoders.autoencoder_config(kind, train.TrainConfig(picture_size=32),
                                             bottleneck=bottleneck)
    assert (config.channels, config.grid) == (channels, grid) and math.prod(grid) <= 64


def test_decode_stays_in_the_range_of_a_picture():
    decoded = small("kl").decode(1000 * torch.randn(2, 4, 8, 8))
    assert (decoded.min(), decoded.max()) == (-1, 1)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_decode_of_encode_is_what_the_loss_is_measured_on(bottleneck, pictures):
    model = fitted(bottleneck, pictures)
    z_q = model.bottleneck(model.encoder(pictures))[0]
    torch.testing.assert_close(model(pictures), model.decoder(z_q).clamp(-1, 1))


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_only_training_changes_a_buffer(bottleneck, pictures):
    model = fitted(bottleneck, pictures)
    if bottleneck == "vq":
        model.bottleneck.count[:4] = 0                      # dead, and not to be revived
    before = buffers(model)
    model.loss(pictures)
    model(pictures)
    model.train()(pictures)                                 # reading codes is no training step
    assert_same(buffers(model), before)


def test_the_twins_differ_only_in_the_last_convolution_of_the_encoder():
    vq, kl = ({name: tuple(weight.shape) for name, weight in small(kind).named_parameters()}
              for kind in BOTTLENECKS)
    last = f"encoder.{len(small('vq').encoder) - 1}."
    assert vq.keys() == kl.keys()
    assert {name for name in vq if vq[name] != kl[name]} == {last + "weight", last + "bias"}
    assert kl[last + "bias"] == (2 * vq[last + "bias"][0],)


@pytest.mark.parametrize("bottleneck, decibels", [("vq", 22), ("kl", 28)])
def test_one_batch_can_be_memorised(bottleneck, decibels, pictures):
    model = small(bottleneck, latent_channels=8, codes=128).train()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(pictures)[0].backward()
        optimizer.step()
    error = (model.eval()(pictures) - pictures).square().mean().item()
    assert 10 * math.log10(4 / error) > decibels            # 2 is the range of a picture


def test_a_bottleneck_of_another_name_is_an_error():
    with pytest.raises(ValueError, match="fsq"):
        small("fsq")


# --- sound as a picture --------------------------------------------------------------------------

def chords(count):
    rng = np.random.default_rng(0)
    scenes = [tones.sample(rng) for _ in range(count)]
    return scenes, torch.from_numpy(np.stack([tones.render(scene, rng) for scene in scenes]))


def test_transform_is_that_of_torch():
    waves = chords(3)[1][:, 0]
    bins = vqvae.transform(waves)
    padded = torch.nn.functional.pad(waves, (64, 64))
    expected = torch.stft(padded, 256, 128, window=torch.hann_window(256), center=False,
                          return_complex=True)[:, :128].transpose(1, 2)         # (N, frames, 128)
    assert bins.shape == (3, 32, 128)
    torch.testing.assert_close(bins, expected, atol=1e-4, rtol=0)


def test_untransform_undoes_transform():
    waves = chords(3)[1][:, 0]
    torch.testing.assert_close(vqvae.untransform(vqvae.transform(waves)), waves, atol=3e-3, rtol=0)


def test_a_sound_of_one_frequency_is_one_line_of_its_spectrum():
    time = torch.arange(4096) / 8000
    for row in (10, 40, 100):                       # rows are 8000 / 256 Hz apart
        picture = vqvae.spectrum(0.2 * torch.sin(2 * math.pi * row * 31.25 * time)[None, None])
        assert picture.shape == (1, 1, 128, 32) and picture.abs().max() <= 1
        middle = picture[0, 0, :, 1:-1]
        assert (middle.argmax(0) == row).all()
        away = (torch.arange(128) - row).abs() > 3
        assert middle[away].max() < -0.9


def test_ten_times_as_loud_is_as_much_brighter_everywhere():
    waves = 0.02 * torch.randn(1, 1, 4096)
    soft, loud = vqvae.spectrum(waves), vqvae.spectrum(10 * waves)
    inside = (soft > -1) & (loud < 1)
    assert inside.float().mean() > 0.5
    step = 2 * math.log(10) / math.log(vqvae.LOUD / vqvae.QUIET)
    torch.testing.assert_close((loud - soft)[inside], torch.full_like(soft[inside], step))


def test_sounds_come_back_from_their_spectra():
    scenes, waves = chords(24)
    rebuilt = vqvae.waveform(vqvae.spectrum(waves), rounds=40)
    assert rebuilt.shape == waves.shape
    read = [tones.grade(wave.numpy()) for wave in rebuilt]
    assert sum(a == b for a, b in zip(read, scenes)) >= 23
    assert torch.equal(rebuilt, vqvae.waveform(vqvae.spectrum(waves), rounds=40))
    silent = vqvae.waveform(torch.full((1, 1, 128, 32), -1.0), rounds=5)
    assert silent.isfinite().all() and silent.square().mean().sqrt() < 0.01


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_a_clip_is_its_frames_one_below_the_other(bottleneck, pictures):
    model = small(bottleneck)
    model.train().loss(pictures)                                # places the codes
    model.eval()
    codec = vqvae.Codec("video", model, frames=4)
    clips = torch.stack([pictures[:4], pictures[4:]])                           # (2, 4, 3, 32, 32)
    with torch.no_grad():
        encoded, frames = codec.encode(clips), model.encode(pictures)
        assert encoded.shape == (2, *codec.shape[bottleneck == "vq":])
        for clip in range(2):
            for frame in range(4):
                rows = encoded[clip, ..., 8 * frame:8 * frame + 8, :]
                torch.testing.assert_close(rows, frames[4 * clip + frame])
        rebuilt = codec.decode(encoded)
        assert rebuilt.shape == clips.shape
        torch.testing.assert_close(rebuilt.flatten(0, 1), model.decode(frames))


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_a_sound_is_encoded_by_its_spectrum(bottleneck):
    model = small(bottleneck, channels=1, size=(128, 32), strides=((4, 2), (4, 2)))
    waves = chords(4)[1]
    model.train().loss(vqvae.spectrum(waves))
    codec = vqvae.Codec("audio", model.eval())
    with torch.no_grad():
        encoded = codec.encode(waves)
        assert encoded.shape == (4, *codec.shape[bottleneck == "vq":]) and codec.shape[1:] == (8, 8)
        torch.testing.assert_close(encoded, model.encode(vqvae.spectrum(waves)))
        rebuilt = codec.decode(encoded)
        assert rebuilt.shape == waves.shape
        torch.testing.assert_close(rebuilt, vqvae.waveform(model.decode(encoded)))
    assert codec.codes == (32 if bottleneck == "vq" else 0)


def test_spectra_and_waveforms_keep_fp32_under_bf16_autocast(monkeypatch):
    model, waves = small("kl", channels=1, size=(128, 32), strides=((4, 2), (4, 2))), chords(4)[1]
    monkeypatch.setattr(model, "encode", lambda spectra: spectra)
    monkeypatch.setattr(model, "decode", lambda spectra: spectra)
    codec, spectra = vqvae.Codec("audio", model), vqvae.spectrum(waves)
    rebuilt = vqvae.waveform(spectra)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(waves), spectra)
        assert torch.equal(codec.decode(spectra), rebuilt)
        assert torch.equal(vqvae.spectrum(waves), spectra)
