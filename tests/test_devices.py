"""What a GPU or a Mac would stumble over, looked for without one."""

import contextlib

import pytest
import torch

import small
from adapter import load

vqvae = load("vqvae")
SYSTEMS = [(setting, towers) for setting in small.SETTINGS for towers in (None, (0, 1, 2, 3))]


def systems():
    """(model, batch) of every architecture."""
    for setting, towers in SYSTEMS:
        yield (small.randomise(small.untrained(setting, towers)).train(),
               small.pack(setting, spans=small.PADDED))
    for bottleneck in ("vq", "kl"):
        config = vqvae.VQVAEConfig(bottleneck=bottleneck, size=(16, 16), widths=(8, 16))
        yield vqvae.VQVAE(config).train(), torch.rand(4, 3, 16, 16)


every_system = pytest.mark.parametrize(
    "number", range(len(SYSTEMS) + 2),
    ids=[f"{setting}-{'mot' if towers else 'dense'}" for setting, towers in SYSTEMS] + ["vq", "kl"])


@every_system
def test_loss_and_backward_run_where_nothing_can_be_read_back(number, monkeypatch):
    """The meta device has shapes but no values: .item(), boolean indexing, and most meetings with a
    tensor that was left on the CPU are errors there."""
    autocast = torch.autocast           # which knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda device, **options: contextlib.nullcontext()
                        if device == "meta" else autocast(device, **options))
    model, batch = list(systems())[number]
    model, batch = model.to("meta"), batch.to("meta")
    loss, parts = model.loss(batch, model.totals(batch))
    loss.backward()
    assert loss.device.type == "meta" and loss.shape == ()
    assert all(part.device.type == "meta" for part in parts.values())
    used = [p for p in model.parameters() if p.grad is not None]
    assert used and all(p.grad.shape == p.shape for p in used)


@every_system
def test_the_loss_is_one_graph(number):
    """torch.compile(fullgraph=True): a break would be an error."""
    model, batch = list(systems())[number]
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    torch.manual_seed(0)
    found = compiled(batch, model.totals(batch))[0]
    assert found.isfinite()


@every_system
def test_no_tensor_is_in_double_precision_or_complex(number):
    """Which Apple's MPS lacks."""
    seen = set()

    class Types(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            seen.update(x.dtype for x in (made if isinstance(made, (tuple, list)) else [made])
                        if isinstance(x, torch.Tensor))
            return made
    model, batch = list(systems())[number]
    with Types():
        model.loss(batch, model.totals(batch))[0].backward()
    assert torch.float32 in seen
    assert not seen & {torch.float64, torch.complex64, torch.complex128}
