from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from capgap.errors import UserError
from capgap.models.build import build_model, load_model, save_model, shape_of
from capgap.models.shape import Shape, ladder_shape
from capgap.prune.importance import Importance, score
from capgap.prune.surgery import choose, cut, prune_model
from capgap.prune.units import masked
from lively import lively

# teacher and what is cut out of it: every dimension shrinks
CASES = {
    "llama": (
        Shape("llama", 32, 4, 4, 4, 8, 40, 53, 24, True),
        {"hidden": 24, "layers": 3, "heads": 2, "kv_heads": 2, "ffn": 27},
    ),
    "llama, shared key-value heads": (
        Shape("llama", 36, 4, 6, 3, 8, 40, 53, 24, False),
        {"hidden": 24, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 27},
    ),
    **{
        name: (
            Shape(name, 36, 4, 6, 3, 8, 40, 53, 24, tied),
            {"hidden": 24, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 27},
        )
        for name, tied in (
            ("mistral", False),
            ("qwen2", True),
            ("qwen3", True),
            ("gemma2", True),
            ("olmo2", False),
            ("phi3", False),
            ("ministral3", False),
            ("smollm3", True),
            ("gemma3_text", True),
            ("olmo3", False),
        )
    },
    "granite": (
        Shape("granite", 48, 4, 6, 3, 8, 40, 53, 24, True),
        {"hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 27},
    ),
    "gpt_neox": (
        Shape("gpt_neox", 32, 4, 4, 4, 8, 40, 53, 24, True),
        {"hidden": 24, "layers": 3, "heads": 3, "kv_heads": 3, "ffn": 27},
    ),
    "gpt_neox, untied": (
        Shape("gpt_neox", 32, 4, 4, 4, 8, 40, 53, 24, False),
        {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 2, "ffn": 27},
    ),
    "gpt2": (
        Shape("gpt2", 32, 4, 4, 4, 8, 40, 53, 24, True),
        {"hidden": 24, "layers": 3, "heads": 3, "kv_heads": 3, "ffn": 27},
    ),
}


def windows(length=20):
    return torch.randint(53, (2, length), generator=torch.Generator().manual_seed(1))


def random_importance(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Importance(
        heads=torch.rand(shape.layers, shape.kv_heads, generator=generator),
        neurons=torch.rand(shape.layers, shape.ffn, generator=generator),
        hidden=torch.rand(shape.hidden, generator=generator),
        layers=torch.rand(shape.layers, generator=generator),
        tokens=0,
        flops=0,
    )


def masks_that_keep(importance, own, shape):
    """Zeros and ones from thresholds on the scores, not from the indices that the cut uses."""

    def top(scores, number):
        return (scores >= scores.sort(dim=-1).values[..., -number, None]).float()

    return {
        "heads": top(importance.heads, shape.kv_heads),
        "neurons": top(importance.neurons, shape.ffn),
        "hidden": top(importance.hidden, shape.hidden),
        "layers": top(importance.layers, shape.layers),
    }


@pytest.mark.parametrize(
    ("case", "only"),
    [
        (case, only)
        for case in CASES
        for only in ("all", "hidden", "heads", "ffn", "layers")
        # where hidden = heads x head_size they are cut together or not at all
        if CASES[case][0].family.free_width or only not in ("hidden", "heads")
    ],
)
def test_pruned_forward_is_the_masked_forward(case, only):
    own, changes = CASES[case]
    if only != "all":
        names = {"hidden": ("hidden",), "heads": ("heads", "kv_heads")}.get(only, (only,))
        changes = {name: changes[name] for name in names}
    shape = replace(own, **changes)
    model, importance = lively(own), random_importance(own)
    small = cut(model, importance, shape)
    with masked(model, masks_that_keep(importance, own, shape)):
        expected = model(windows()).logits
    torch.testing.assert_close(small(windows()).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(small(windows()).logits, model(windows()).logits, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_a_plain_model_of_the_announced_size(case, tmp_path):
    own, changes = CASES[case]
    shape = replace(own, **changes)
    model = lively(own)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    small = cut(model, random_importance(own), shape)
    assert type(small) is type(model)
    assert shape_of(small.config) == shape
    assert small.num_parameters() == shape.parameters().total
    assert shape_of(model.config) == own
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())

    save_model(small, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert shape_of(loaded.config) == shape
    assert torch.equal(loaded(windows()).logits, small(windows()).logits)
    start = windows()[:1, :5]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    text = loaded.generate(start, **options)
    assert torch.equal(text, small.generate(start, **options))
    for length in range(5, 11):
        assert text[0, length] == small(text[:, :length]).logits[0, -1].argmax()


@pytest.mark.parametrize("case", CASES)
def test_keeping_everything_keeps_the_weights_bit_for_bit(case):
    own, _ = CASES[case]
    model = lively(own).to(torch.bfloat16)
    same = cut(model, random_importance(own), own)
    assert same.dtype == torch.bfloat16
    weights = model.state_dict()
    assert same.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in same.state_dict().items())
    assert all(
        new.data_ptr() != old.data_ptr()
        for new, old in zip(same.parameters(), model.parameters(), strict=True)
    )


def test_settings_of_the_teacher_stay():
    own, changes = CASES["llama"]
    model = lively(own).eval()
    model.config.rope_parameters["rope_theta"] = 777.0
    model.config.rms_norm_eps = 1e-3
    model.generation_config.max_new_tokens = 5
    small = cut(model, random_importance(own), replace(own, **changes))
    assert small.config.rope_parameters["rope_theta"] == 777.0
    assert small.model.norm.variance_epsilon == 1e-3
    assert small.generation_config.max_new_tokens == 5
    assert not small.training


def test_the_most_important_units_stay_in_order():
    importance = Importance(
        heads=torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.2, 0.2, 0.2]]),
        neurons=torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4], [1.0, 4, 1, 4]]),
        hidden=torch.tensor([0.0, 5, 1, 5, 2, 2]),
        layers=torch.tensor([0.3, 0.1, 0.2]),
        tokens=0,
        flops=0,
    )
    shape = Shape("llama", 4, 2, 2, 2, 2, 2, 7, 8, True)
    kept = choose(importance, shape)
    assert kept["layers"].tolist() == [0, 2]
    assert kept["hidden"].tolist() == [1, 3, 4, 5]
    # equal scores: the first ones
    assert kept["heads"].tolist() == [[1, 2], [0, 1]]
    assert kept["neurons"].tolist() == [[0, 1], [1, 3]]


def test_important_units_are_found():
    """Units that were switched off in the weights are the ones that pruning drops."""
    own = Shape("llama", 36, 3, 4, 4, 8, 40, 53, 24, True)
    model = lively(own)
    dead_neurons, dead_hidden = [3, 11, 30], [0, 7, 8, 21]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, dead_neurons] = 0
            layer.self_attn.o_proj.weight[:, 8:16] = 0
            layer.self_attn.o_proj.weight[dead_hidden] = 0
            layer.mlp.down_proj.weight[dead_hidden] = 0
        model.model.embed_tokens.weight[:, dead_hidden] = 0
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    shape = replace(own, layers=2, heads=3, kv_heads=3, ffn=37)
    kept = choose(score(model, [windows()], method="weights"), shape)
    assert kept["layers"].tolist() == [0, 2]
    assert kept["heads"].tolist() == [[0, 2, 3]] * 2
    assert not set(dead_neurons) & set(kept["neurons"].flatten().tolist())
    small = prune_model(model, shape.parameters().non_embedding, [windows()])
    assert shape_of(small.config).layers <= 3


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_prune_meets_the_count(architecture):
    teacher = build_model(ladder_shape(architecture, 100_000, vocabulary=53, positions=24), seed=0)
    importance = score(teacher, [windows()])
    small = prune_model(teacher, 40_000, importance)
    counted = sum(
        weight.numel()
        for name, weight in small.named_parameters()
        if not any(table in name for table in ("embed", "wte", "wpe"))
    )
    assert counted == pytest.approx(40_000, rel=0.005)
    again = prune_model(teacher, "40k", [windows()])
    assert torch.equal(small(windows()).logits, again(windows()).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_rows_that_pad_the_vocabulary_go(architecture, tmp_path):
    own, sizes = CASES[architecture]
    shape = replace(own, **sizes)
    teacher, importance = lively(own), random_importance(own)
    whole = cut(teacher, importance, shape)
    words = own.vocabulary - 7
    small = cut(teacher, importance, replace(shape, vocabulary=words))
    inputs = windows() % words
    assert torch.equal(small(inputs).logits, whole(inputs).logits[..., :words])
    save_model(small, tmp_path / "small")
    assert load_model(tmp_path / "small").config.vocab_size == words


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden": 40}, "hidden 40"),
        ({"layers": 5}, "layers 5"),
        ({"ffn": 41}, "ffn 41"),
        ({"kv_heads": 2}, "4 heads on 2 kv_heads"),
        ({"head_size": 4}, "head_size 4"),
        ({"vocabulary": 54}, "vocabulary 54"),
        ({"tied": False}, "tied False"),
    ],
)
def test_shapes_that_do_not_fit(changes, word):
    own, _ = CASES["llama"]
    with pytest.raises(UserError, match=word):
        cut(lively(own), random_importance(own), replace(own, **changes))


def test_importance_of_another_model():
    own, _ = CASES["llama"]
    with pytest.raises(UserError, match="another shape"):
        cut(lively(own), random_importance(replace(own, layers=3)), own)
