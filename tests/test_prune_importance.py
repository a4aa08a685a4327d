import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from capgap.errors import UserError
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.prune.importance import loss_of, score
from capgap.prune.units import masked, unit_sizes
from lively import in_double, lively

SHAPES = {
    "llama": Shape("llama", 24, 2, 4, 2, 6, 20, 31, 16, True),
    "gpt_neox": Shape("gpt_neox", 24, 2, 4, 4, 6, 20, 31, 16, True),
    "gpt2": Shape("gpt2", 24, 2, 4, 4, 6, 20, 31, 16, True),
    **{
        name: Shape(name, 24, 2, 4, 2, 6, 20, 31, 16, True)
        for name in FAMILIES
        if name not in ("llama", "gpt_neox", "gpt2")
    },
}


def windows(seed, batch=3):
    return torch.randint(31, (batch, 11), generator=torch.Generator().manual_seed(seed))


def ones(shape):
    return {unit: torch.ones(size, dtype=torch.float64) for unit, size in unit_sizes(shape).items()}


@pytest.mark.parametrize("architecture", SHAPES)
def test_masks_of_ones_change_nothing(architecture, nothing_rounds):
    model = lively(SHAPES[architecture], torch.float64)
    ids = windows(0)
    expected = model(ids).logits
    masks = ones(SHAPES[architecture])
    # Gemma 2 has four norms a layer, whose sums are taken in another order
    atol = 1e-5 if architecture == "gemma2" else 1e-6
    with masked(model, masks):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=atol)
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ZeroDivisionError), masked(model, masks):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def nothing_rounds(monkeypatch):
    """Transformers takes softmax and norms of heads in fp32, too coarse for small differences."""
    softmax = torch.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda values, dim, dtype=None: softmax(values, dim)
    )

    def rms_norm(module, values):
        return torch.nn.functional.rms_norm(
            values, module.weight.shape, module.weight, module.variance_epsilon
        )

    monkeypatch.setattr(Qwen3RMSNorm, "forward", rms_norm)


@pytest.mark.usefixtures("nothing_rounds")
@pytest.mark.parametrize("architecture", SHAPES)
def test_importance_is_the_finite_difference_of_the_loss(architecture, monkeypatch):
    if architecture == "gemma3_text":
        in_double(monkeypatch)  # its many norms round to single precision
    model, ids = lively(SHAPES[architecture], torch.float64), windows(0)
    importance = score(model, [ids], method="first_order")

    @torch.no_grad()
    def slope(part, entry, step=1e-4):
        losses = []
        for sign in (1, -1):
            masks = ones(SHAPES[architecture])
            masks[part][entry] += sign * step
            with masked(model, masks):
                losses.append(loss_of(model, ids))
        return abs(losses[0] - losses[1]).item() / (2 * step)

    for part in ("heads", "neurons", "hidden", "layers"):
        scores = getattr(importance, part)
        for row in range(2) if scores.ndim == 2 else (...,):
            values = scores[row]
            entries = [(row, i) if scores.ndim == 2 else i for i in range(len(values))]
            slopes = torch.tensor([slope(part, entry) for entry in entries])
            close = {"rtol": 2e-3, "atol": 1e-4, "check_dtype": False}
            torch.testing.assert_close(values, slopes / slopes.norm(), **close, msg=f"{part} {row}")


def test_importance_is_the_mean_of_absolute_values_over_batches():
    model = lively(SHAPES["llama"], torch.float64)
    first, second = (
        score(model, [windows(0)], method="first_order"),
        score(model, [windows(1)], method="first_order"),
    )
    both = score(model, [windows(0), windows(1)], method="first_order")
    assert both.tokens == 60
    assert both.flops == 4 * SHAPES["llama"].parameters().total * 60
    # the two one-batch scores are known up to their norms: two unknowns, many equations
    pair = torch.stack([first.hidden, second.hidden], dim=1)
    weights = torch.linalg.lstsq(pair, both.hidden[:, None]).solution
    assert (weights > 0).all()
    torch.testing.assert_close((pair @ weights)[:, 0], both.hidden, rtol=1e-5, atol=1e-6)


def test_shapes_norms_and_dtype():
    importance = score(lively(SHAPES["llama"], torch.bfloat16), [windows(0)], method="first_order")
    assert importance.heads.shape == (2, 2)
    assert importance.neurons.shape == (2, 20)
    assert importance.hidden.shape == (24,)
    assert importance.layers.shape == (2,)
    for scores in (importance.heads, importance.neurons, importance.hidden, importance.layers):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.norm(dim=-1), torch.ones(scores.shape[:-1]))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = lively(SHAPES["gpt_neox"], torch.float64).train(training)
    model.gpt_neox.embed_in.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainable = [weight.requires_grad for weight in model.parameters()]
    with torch.no_grad():
        score(model, [windows(0)], method="first_order")
    assert model.training == training
    assert [weight.requires_grad for weight in model.parameters()] == trainable
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_mistakes():
    model = lively(SHAPES["llama"], torch.float64)
    with pytest.raises(UserError, match="at least one batch"):
        score(model, [], method="first_order")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="non-finite norm of "):
        score(model, [windows(0)], method="first_order")
    assert all(weight.requires_grad for weight in model.parameters())
