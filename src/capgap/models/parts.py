"""A causal language model as backbone and head; what lies between them and the logits is tried.

Losses are computed from hidden states and a head, so a model that does something else to its
logits would be read wrongly, and in silence. No list of architectures tells: a few tokens go
through the model and through its parts, and what differs is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from capgap.errors import UserError, first_line
from capgap.models.stored import text_config

TRIED_TOKENS = 8
# Largest difference, as a share of the largest value: the same operations in the same dtype
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Of a config's numbers that scale logits, those that divide where a model has the choice
_DIVISORS = ("logits_scaling",)


class LogitTransform(NamedTuple):
    """What a model does to its head's product: softcap * tanh(scale * product / softcap)."""

    scale: float
    softcap: float | None

    def __call__(self, product: Tensor) -> Tensor:
        logits = product * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Parts(nn.Module):
    """A causal language model as backbone and head, and what it does to the head's product (Gemma 2
    caps, Cohere and Granite scale). Called with token ids it gives hidden states.

    A module, so that whatever wraps it (FSDP) has all weights at hand in one call.

    UserError for a model whose logits are not those of its parts, found out by trying.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            raise UserError(f"{_name(model)} has no head that is one product: it is not supported")
        # it looks for padding in the tokens, for which the host waits; there is none here
        vars(self.backbone)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
        # tried once a model: later its weights may lie in parts on several devices
        known: LogitTransform | None = vars(model).get("_capgap_logits")
        if known is None:
            known = vars(model)["_capgap_logits"] = _try_out(self)
        self.logit_scale, self.softcap = known

    @property
    def backbone(self) -> nn.Module:
        """Everything below the head; of a model that also sees or hears its language model."""
        below = self.model.base_model
        is_nested = text_config(self.model.config) is not self.model.config
        if below is self.model or is_nested:
            below = self.model.get_decoder()
        # Llama 4 keeps a whole language model, with a head, where others keep what is below it
        return below.model if hasattr(below, "lm_head") else below

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def active_parameters(self) -> int:
        """Those that a token goes through: of experts as many as are chosen for it."""
        chosen = getattr(text_config(self.model.config), "num_experts_per_tok", None)
        active = 0
        for name, weight in self.model.named_parameters():
            is_shared = chosen and ".experts." in name and weight.ndim > 1
            active += weight.numel() * chosen // weight.shape[0] if is_shared else weight.numel()
        return active

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers, in their order."""
        return next(one for one in self.backbone.modules() if isinstance(one, nn.ModuleList))

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """input_ids [batch, seq] to the states after the final norm [batch, seq, width].

        positions [batch, seq] count from 0 within every document of a packed row; tokens then
        attend within their document alone (transformers sees documents where positions restart).
        """
        with _documents_are_known(positions is not None):
            return self.backbone(
                input_ids=input_ids, position_ids=positions, use_cache=False
            ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., width] to the model's own logits [..., vocabulary]."""
        return LogitTransform(self.logit_scale, self.softcap)(self.head(hidden))

    @torch.no_grad()
    def check_documents(self) -> None:
        """UserError where documents of a packed row see each other although their positions are
        given: some architectures have no positions, and would not say so."""
        ids = _trial(self.model)
        half = TRIED_TOKENS // 2
        positions = torch.arange(TRIED_TOKENS, device=ids.device)[None] % half
        try:
            with _evaluating(self):
                packed, alone = self(ids, positions)[:, half:], self(ids[:, half:])
            apart = equal_logits(packed, alone)
        except (TypeError, RuntimeError):
            apart = False
        if not apart:
            raise UserError(
                f"{_name(self.model)} does not keep the documents of a row apart: leave "
                "training.document_mask (--document-mask) out"
            )


@contextmanager
def _documents_are_known(several: bool) -> Iterator[None]:
    """transformers would ask the device whether a row holds several documents, and the host would
    wait for the answer in every forward pass: who gave positions, or none, knows it."""
    asked = masking_utils.find_packed_sequence_indices

    def known(position_ids: Tensor) -> Tensor | None:
        """The number of every token's document in its row [batch, seq]."""
        if not several:
            return None
        return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    masking_utils.find_packed_sequence_indices = known
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _trial(model: PreTrainedModel) -> Tensor:
    """A few token ids [1, TRIED_TOKENS] that every vocabulary has."""
    head = model.get_output_embeddings().weight
    return (torch.arange(3, 3 + TRIED_TOKENS, device=head.device) % head.shape[0])[None]


@torch.no_grad()
def trial_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the trial's tokens [1, TRIED_TOKENS, vocabulary], by the whole model."""
    logits: Tensor = model.eval()(input_ids=_trial(model), use_cache=False).logits
    return logits


@torch.no_grad()
def _try_out(parts: Parts) -> LogitTransform:
    """What a model does to its head's product, by what comes of a few tokens and of known products
    in place of the head's.

    UserError: its states or its logits are no such function of the parts.
    """
    model = parts.model
    seen: list[tuple[Tensor, Tensor]] = []

    def replace_product(head: nn.Module, inputs: tuple[Tensor, ...], product: Tensor) -> Tensor:
        count = product.numel()
        # from far below to far above what any softcap leaves alone
        probe = torch.linspace(-60.0, 60.0, count).roll(count // 3).reshape(product.shape)
        seen.append((inputs[0], probe.to(product)))
        return seen[-1][1]

    def refused(why: str) -> UserError:
        return UserError(
            f"{_name(model)} cannot be read as backbone and head ({why}): docs/families.md lists "
            "the architectures that can"
        )

    try:
        with _evaluating(model):
            # the whole model first: it may keep something of a call
            with parts.head.register_forward_hook(replace_product):
                logits = model(input_ids=_trial(model), use_cache=False).logits
            states = parts(_trial(model))
    # whatever an architecture raises that is no language model on its own
    except Exception as error:
        raise refused(f"{type(error).__name__}: {first_line(error)}") from error
    if not seen or logits.shape != seen[-1][1].shape:
        raise refused("its logits are not what its head gives")
    head_states, probe = seen[-1]
    factor = _factor(states, head_states)
    if factor is None:
        raise refused("its head reads other states than its backbone gives")
    for transform in _candidates(text_config(model.config)):
        if equal_logits(transform(probe.double()), logits):
            return LogitTransform(transform.scale * factor, transform.softcap)
    raise refused("it changes its logits in a way that its config does not name")


def _factor(states: Tensor, head_states: Tensor) -> float | None:
    """The factor on states before the head reads them; None where it reads others."""
    if states.shape != head_states.shape:
        return None
    if equal_logits(states, head_states):
        return 1.0
    ours, its = states.double().flatten(), head_states.double().flatten()
    factor = float(ours @ its / (ours @ ours).clamp_min(1e-300))
    return factor if equal_logits(ours * factor, head_states.flatten()) else None


def equal_logits(one: Tensor, other: Tensor) -> bool:
    """Within what the dtype rounds; a model of NaN is told by those who read it."""
    tolerance = _TOLERANCE.get(other.dtype, 2e-2)
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def _candidates(config: Any) -> Iterator[LogitTransform]:
    """What the numbers of a config may mean that speak of logits, the likeliest first."""
    caps: list[float | None] = []
    scales = [1.0]
    for name, value in config.to_dict().items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not ("logit" in name or "lm_head" in name) or not is_number or value <= 0:
            continue
        if "cap" in name:
            caps.append(float(value))
        else:
            both = [1 / value, float(value)]
            scales = [*(both if name in _DIVISORS else reversed(both)), *scales]
    for cap in (*caps, None):
        for scale in scales:
            yield LogitTransform(scale, cap)


def _name(model: PreTrainedModel) -> str:
    kind = f"the architecture {model.config.model_type!r}"
    return f"{model.name_or_path} ({kind})" if model.name_or_path else kind
