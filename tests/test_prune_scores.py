"""Scores of units beside the first-order one on masks: each against its own formula."""

from dataclasses import replace

import pytest
import torch

from capgap.errors import UserError
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.prune import DEPTHS, METHODS
from capgap.prune.importance import loss_of, score
from capgap.prune.surgery import cut
from lively import lively

OWN = Shape("llama", 24, 3, 4, 2, 6, 20, 31, 16, True)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(31, (4, 11), generator=generator).split(2))


def assert_proportional(found, expected):
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))


def test_weights_are_worth_their_gradient(batches):
    model = lively(OWN)
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
    model = lively(OWN)
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


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "olmo2"])
def test_hidden_units_are_measured_where_layers_read_them(batches, architecture):
    """Every norm counts alike, and one that writes into the stream only where none reads it: the
    last ones of Gemma 3 write hundreds of times what the others read."""
    model = lively(replace(OWN, architecture=architecture))
    names = {
        "llama": ("input_layernorm", "post_attention_layernorm"),
        "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }[architecture]
    with torch.no_grad():
        model.model.layers[-1].get_submodule(names[1]).weight *= 50
    seen = {}

    def add(module, inputs, output):
        seen[module] = seen.get(module, 0) + output.abs().flatten(0, -2).sum(0)

    handles = [
        layer.get_submodule(name).register_forward_hook(add)
        for layer in model.model.layers
        for name in names
    ]
    with torch.no_grad():
        for windows in batches:
            model(windows[:, :-1])
    for handle in handles:
        handle.remove()
    expected = sum(one / one.norm() for one in seen.values())
    assert_proportional(score(model, batches, method="activation").hidden, expected)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_norm_of_a_unit_is_that_of_the_weights_a_cut_keeps_of_it(architecture):
    family = FAMILIES[architecture]
    shape = Shape(architecture, 24, 2, 4, 2 if family.grouped_heads else 4, 6, 20, 31, 16, True)
    model = lively(shape)
    found = score(model, [], method="norm")
    cuts = [("neurons", {"neurons", "gate_up"}, {"ffn": 1})]
    # the others have hidden = heads x head_size, so that a cut of heads takes hidden units too
    if family.free_width:
        one_head = {"kv_heads": 1, "heads": shape.heads // shape.kv_heads}
        cuts.append(("heads", {"query", "key", "qkv"}, one_head))

    def squares(of, kinds):
        """In the first layer, of the tensors that these units have rows in."""
        layer = next(iter(of.get_submodule(family.layers).children()))
        return sum(
            layer.get_parameter(name).square().sum()
            for name, axes in family.layer_tensors.items()
            if kinds & set(axes)
        )

    for unit, kinds, sizes in cuts:
        scores = getattr(found, unit)
        for place in range(scores.shape[1]):
            wanted = torch.zeros_like(scores)
            wanted[:, place] = 1.0
            alone = cut(model, replace(found, **{unit: wanted}), replace(shape, **sizes))
            share = squares(alone, kinds) / squares(model, kinds)
            assert scores[0, place] ** 2 == pytest.approx(share.item(), rel=1e-4)
    assert (found.tokens, found.flops) == (0, 0)


def test_a_layer_that_does_nothing_has_no_influence(batches):
    model = lively(OWN)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    for method in METHODS:
        importance = score(model, batches, method=method, depth="influence")
        found, passes = importance.layers, {"first_order": 6, "weights": 8}.get(method, 2)
        assert importance.flops == passes * OWN.parameters().total * 40
        assert found[1] == pytest.approx(0.0, abs=1e-4)
        assert min(found[0], found[2]) > 0.01


def test_the_ends_go_first():
    found = score(lively(replace(OWN, layers=5)), [], method="random", depth="ends")
    assert found.layers.argsort(descending=True)[:1].tolist() == [2]
    assert found.layers[0] == found.layers[4] < found.layers[1] == found.layers[3]


def test_random_scores_are_drawn_by_their_seed():
    model = lively(OWN)
    one, same, other = (score(model, [], method="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.neurons, same.neurons)
    assert not torch.equal(one.neurons, other.neurons)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [None, *DEPTHS])
def test_the_model_is_left_as_it_was(batches, method, depth):
    model = lively(OWN).train()
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
        score(lively(OWN), batches, method="best")
    with pytest.raises(UserError, match="no importance depth 'deep'"):
        score(lively(OWN), batches, depth="deep")
    with pytest.raises(UserError, match="at least one batch"):
        score(lively(OWN), [], method="norm", depth="influence")
