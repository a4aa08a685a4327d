"""Scores of units beside the first-order one on masks: each against its own formula."""

import pytest
import torch

from capgap.errors import UserError
from capgap.models.build import build_model
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.prune.importance import DEPTHS, METHODS, loss_of, score

OWN = Shape("llama", 24, 3, 4, 2, 6, 20, 31, 16, True)


def lively(shape=OWN):
    model = build_model(shape, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(31, (4, 11), generator=generator).split(2))


def assert_proportional(found, expected):
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))


def test_weights_are_worth_their_gradient(batches):
    model = lively()
    found = score(model, batches, method="weights")
    neurons, heads, layers = torch.zeros(3, 20), torch.zeros(3, 2), torch.zeros(3)
    for windows in batches:
        model.zero_grad()
        loss_of(model, windows).backward()
        for index, layer in enumerate(model.model.layers):
            worth = {
                name: (weight * weight.grad).abs().detach()
                for name, weight in layer.named_parameters()
            }
            for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
                neurons[index] += worth[f"mlp.{name}.weight"].sum(axis)
            for head in range(2):
                query, key = slice(12 * head, 12 * head + 12), slice(6 * head, 6 * head + 6)
                heads[index, head] += worth["self_attn.q_proj.weight"][query].sum()
                heads[index, head] += worth["self_attn.o_proj.weight"][:, query].sum()
                heads[index, head] += worth["self_attn.k_proj.weight"][key].sum()
                heads[index, head] += worth["self_attn.v_proj.weight"][key].sum()
            layers[index] += sum(one.sum() for one in worth.values())
    assert_proportional(found.neurons, neurons)
    assert_proportional(found.heads, heads)
    assert_proportional(found.layers, layers)
    assert (found.tokens, found.flops) == (40, 6 * OWN.parameters().total * 40)


def test_activations_of_neurons_and_hidden_units(batches):
    model = lively()
    found = score(model, batches, method="activation")
    neurons, hidden = torch.zeros(20), torch.zeros(24)
    windows = torch.cat(batches)
    with torch.no_grad():
        states = model(windows[:, :-1], output_hidden_states=True).hidden_states
        layer = model.model.layers[0]
        # of the first layer, whose inputs are the embeddings
        normed = layer.input_layernorm(states[0])
        hidden += normed.abs().flatten(0, 1).sum(0)
        places = torch.arange(10).unsqueeze(0)
        rotary = model.model.rotary_emb(states[0], places)
        attended, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=None)
        normed = layer.post_attention_layernorm(states[0] + attended)
        mlp = layer.mlp
        inside = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        neurons += inside.abs().flatten(0, 1).sum(0)
        cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1)
    assert_proportional(found.neurons[0], neurons)
    expected = (1 - cosine).mean()
    ratio = found.layers[1] / found.layers[0]
    later = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1)
    assert ratio == pytest.approx(((1 - later).mean() / expected).item(), rel=1e-4)
    assert found.hidden.min() > 0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_weight_of_a_unit_counts_in_its_norm(architecture):
    grouped = FAMILIES[architecture].grouped_heads
    shape = Shape(architecture, 24, 2, 4, 2 if grouped else 4, 6, 20, 31, 16, True)
    model = lively(shape)
    found = score(model, [], method="norm")
    family = FAMILIES[architecture]
    layer = next(iter(model.get_submodule(family.layers).children()))
    kinds = {"neurons": {"neurons", "gate_up"}, "heads": {"query", "key", "qkv", "head_qkv"}}
    for unit, names in kinds.items():
        whole = sum(
            layer.get_parameter(name).square().sum()
            for name, axes in family.layer_tensors.items()
            if names & set(axes)
        )
        scores = getattr(found, unit)[0]
        assert scores.norm() == pytest.approx(1.0)
        # one unit switched off takes just its own weights away
        with torch.no_grad():
            before = [one.clone() for one in layer.parameters()]
            layer.get_submodule(family.neuron_inputs).weight.zero_()
            again = score(model, [], method="norm").neurons[0]
            for one, value in zip(layer.parameters(), before, strict=True):
                one.copy_(value)
        assert whole > 0
        assert not torch.equal(again, found.neurons[0])
    assert (found.tokens, found.flops) == (0, 0)


def test_a_layer_that_does_nothing_has_no_influence(batches):
    model = lively()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    for method in METHODS:
        found = score(model, batches, method=method, depth="influence").layers
        assert found[1] == pytest.approx(0.0, abs=1e-4)
        assert min(found[0], found[2]) > 0.01


def test_the_ends_go_first():
    found = score(
        lively(Shape("llama", 24, 5, 4, 2, 6, 20, 31, 16, True)), [], method="random", depth="ends"
    )
    assert found.layers.argsort(descending=True)[:1].tolist() == [2]
    assert found.layers[0] == found.layers[4] < found.layers[1] == found.layers[3]


def test_random_scores_are_drawn_by_their_seed():
    model = lively()
    one, same, other = (score(model, [], method="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.neurons, same.neurons)
    assert not torch.equal(one.neurons, other.neurons)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [None, *DEPTHS])
def test_the_model_is_left_as_it_was(batches, method, depth):
    model = lively().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = score(model, batches, method=method, depth=depth)
    assert torch.isfinite(torch.cat([found.hidden, found.layers, found.heads.flatten()])).all()
    assert model.training
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_unknown_scores_and_no_text(batches):
    with pytest.raises(UserError, match="no importance method 'best'"):
        score(lively(), batches, method="best")
    with pytest.raises(UserError, match="no importance depth 'deep'"):
        score(lively(), batches, depth="deep")
    with pytest.raises(UserError, match="at least one batch"):
        score(lively(), [], method="norm", depth="influence")
