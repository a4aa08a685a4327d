"""Heads that do more than a product: the model's own logits, and the loss and gradient on them."""

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen2Config,
)

from capgap.corpus.tokens import Marks
from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.models.build import build_model
from capgap.models.parts import Parts
from capgap.models.shape import ARCHITECTURES, ladder_shape

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    # a cap small enough to bend these logits
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5, dtype="float32"),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25, dtype="float32"),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0, dtype="float32"),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False, dtype="float32"),
}


@pytest.fixture(params=sorted(CONFIGS))
def model(request):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager")
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    return made.eval()


@pytest.fixture
def windows():
    return torch.randint(61, (3, 11), generator=torch.Generator().manual_seed(1))


def test_parts_give_the_models_own_logits(model, windows):
    parts = Parts(model)
    expected = model(windows).logits
    torch.testing.assert_close(parts.logits(parts(windows)), expected)
    source = HeadInput.of(parts, windows)
    head = source.ready()
    logits = head.logits_(head.product(slice(None)))[:, : head.vocabulary]
    torch.testing.assert_close(logits, expected.flatten(0, 1))


def test_loss_and_gradients_are_those_on_the_models_own_logits(model, windows):
    inputs, targets = windows[:, :-1], windows[:, 1:].reshape(-1)
    generator = torch.Generator().manual_seed(2)
    teacher = HeadInput(
        torch.randn(30, 8, generator=generator), torch.randn(61, 8, generator=generator)
    )
    result = column_loss(
        [HeadInput.of(Parts(model), inputs)],
        targets,
        alphas=[0.5],
        teacher=teacher,
        chunk_tokens=7,
    )
    result.students[0].loss.backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    logits = model(inputs).logits.flatten(0, 1)
    soft = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
    loss = 0.5 * functional.cross_entropy(logits, targets, reduction="sum")
    loss = loss + 0.5 * functional.kl_div(
        logits.log_softmax(-1), soft, log_target=True, reduction="sum"
    )
    loss.backward()
    torch.testing.assert_close(result.students[0].loss, loss, rtol=1e-5, atol=1e-4)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-3, atol=1e-4, msg=name)


DOCUMENTS = (
    [[0, 7, 9, 4], [0, 5, 6], [0, 8, 3, 2, 11]],
    [[12, 13], [0, 14, 15, 16, 17, 18], [0, 19, 20, 21]],
)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        (kind, attention)
        for kind in (*sorted(CONFIGS), *ARCHITECTURES)
        for attention in ("eager", "sdpa")
        if (kind, attention) != ("gemma2", "sdpa")  # transformers has none
    ],
)
def test_documents_of_a_packed_row_do_not_see_each_other(kind, attention):
    if kind in CONFIGS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention)
    else:
        model = build_model(ladder_shape(kind, 20_000, vocabulary=61, positions=16), seed=0)
        model.set_attn_implementation(attention)
    parts = Parts(model.eval())
    rows = torch.tensor([[token for document in row for token in document] for row in DOCUMENTS])
    positions = torch.from_numpy(Marks(0, 0, begin_windows=False).positions(rows.numpy()))
    with torch.no_grad():
        packed = parts(rows, positions)
        alone = [
            torch.cat([parts(torch.tensor([document]))[0] for document in row]) for row in DOCUMENTS
        ]
        unmasked = parts(rows)
    torch.testing.assert_close(packed, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed[:, -1], unmasked[:, -1], rtol=1e-4, atol=1e-5)
