"""A causal language model as backbone and head; what lies between them and the logits is tried.

Losses are computed from hidden states and a head, so a model that does something else to its
logits would be read wrongly, and in silence. No list of architectures tells: a few tokens go
through the model and through its parts, and what differs is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from capgap.errors import UserError
from capgap.models.stored import text_config

TRIED_TOKENS = 8
# Largest difference, as a share of the largest value: the same operations in the same dtype
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Of a config's numbers that scale logits, those that divide where a model has the choice
_DIVISORS = ("logits_scaling",)


class Behind(NamedTuple):
    """What a model does to its head's product: softcap * tanh(scale * product / softcap)."""

    scale: float
    softcap: float | None

    def __call__(self, product: Tensor) -> Tensor:
        logits = product * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Parts(nn.Module):
    """A causal language model as backbone and head, and what it does to the head's logits.

    Called with token ids it gives hidden states. logits = softcap * tanh(logit_scale *
    head(hidden) / softcap), without the cap where it is None (Gemma 2 caps, Cohere and Granite
    scale). A module, so that whatever wraps it (FSDP) has all weights at hand in one call.

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
        behind: Behind | None = vars(model).get("_capgap_behind")
        if behind is None:
            behind = vars(model)["_capgap_behind"] = _tried(self)
        self.logit_scale, self.softcap = behind

    @property
    def backbone(self) -> nn.Module:
        """Everything below the head; of a model that also sees or hears its language model."""
        found = self.model.base_model
        is_nested = text_config(self.model.config) is not self.model.config
        if found is self.model or is_nested:
            found = self.model.get_decoder()
        # Llama 4 keeps a whole language model, with a head, where others keep what is below it
        return found.model if hasattr(found, "lm_head") else found

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def active_parameters(self) -> int:
        """Those that a token goes through: of experts as many as are chosen for it."""
        config = text_config(self.model.config)
        chosen = getattr(config, "num_experts_per_tok", None)
        active = 0
        for name, weight in self.model.named_parameters():
            shared = chosen and ".experts." in name and weight.ndim > 1
            active += weight.numel() * chosen // weight.shape[0] if shared else weight.numel()
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

    @torch.no_grad()
    def check_documents(self) -> None:
        """UserError where documents of a packed row see each other although their positions are
        given: some architectures have no positions, and would not say so."""
        ids = trial(self.model)
        half = TRIED_TOKENS // 2
        positions = torch.arange(TRIED_TOKENS, device=ids.device)[None] % half
        was_training = self.training
        self.eval()
        try:
            packed, alone = self(ids, positions)[:, half:], self(ids[:, half:])
            apart = equal_logits(packed, alone)
        except (TypeError, RuntimeError):
            apart = False
        finally:
            self.train(was_training)
        if not apart:
            raise UserError(
                f"{_name(self.model)} does not keep the documents of a row apart: leave "
                "training.document_mask (--document-mask) out"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., width] to the model's own logits [..., vocabulary]."""
        return Behind(self.logit_scale, self.softcap)(self.head(hidden))


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


@dataclass
class _Seen:
    """What passes through a head in one call of the model: its input, and `probe`, which goes on
    in place of its output."""

    states: Tensor | None = None
    probe: Tensor | None = None

    def __call__(self, head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.states = inputs[0]
        count = output.numel()
        # from far below to far above what any softcap leaves alone
        probe = torch.linspace(-60.0, 60.0, count).roll(count // 3).reshape(output.shape)
        self.probe = probe.to(output)
        return self.probe


def trial(model: PreTrainedModel) -> Tensor:
    """A few token ids [1, TRIED_TOKENS] that every vocabulary has."""
    head = model.get_output_embeddings().weight
    return (torch.arange(3, 3 + TRIED_TOKENS, device=head.device) % head.shape[0])[None]


@torch.no_grad()
def trial_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the trial's tokens [1, TRIED_TOKENS, vocabulary], by the whole model."""
    logits: Tensor = model.eval()(input_ids=trial(model), use_cache=False).logits
    return logits


@torch.no_grad()
def _tried(parts: Parts) -> Behind:
    """What a model does behind its head, by what comes of a few tokens and of known products.

    UserError: its states or its logits are no such function of the parts.
    """
    model, head = parts.model, parts.head
    was_training = model.training
    model.eval()
    ids = trial(model)
    seen = _Seen()
    hook = head.register_forward_hook(seen)
    try:
        # the whole model first: it may keep something of a call
        made = model(input_ids=ids, use_cache=False).logits
        hook.remove()
        states = parts(ids)
    # whatever an architecture raises that is no language model on its own
    except Exception as error:
        raise _refused(model, f"{type(error).__name__}: {_line(error)}") from error
    finally:
        hook.remove()
        model.train(was_training)
    if seen.states is None or seen.probe is None or made.shape != seen.probe.shape:
        raise _refused(model, "its logits are not what its head gives")
    factor = _factor(states, seen.states)
    if factor is None:
        raise _refused(model, "its head reads other states than its backbone gives")
    for behind in _candidates(text_config(model.config)):
        if equal_logits(behind(seen.probe.double()), made):
            return Behind(behind.scale * factor, behind.softcap)
    raise _refused(model, "it changes its logits in a way that its config does not name")


def _factor(states: Tensor, own: Tensor) -> float | None:
    """What the states are multiplied by before the head reads them; None where they are others."""
    if states.shape != own.shape:
        return None
    if equal_logits(states, own):
        return 1.0
    one, other = states.double().flatten(), own.double().flatten()
    factor = float(one @ other / (one @ one).clamp_min(1e-300))
    return factor if equal_logits(one * factor, own.flatten()) else None


def equal_logits(one: Tensor, other: Tensor) -> bool:
    """Within what the dtype rounds; a model of NaN is told by those who read it."""
    tolerance = _TOLERANCE.get(other.dtype, 2e-2)
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def _candidates(config: Any) -> Iterator[Behind]:
    """What the numbers of a config may mean that speak of logits, the likeliest first."""
    numbers = {
        name: float(value)
        for name, value in config.to_dict().items()
        if ("logit" in name or "lm_head" in name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and value > 0
    }
    caps = [value for name, value in numbers.items() if "cap" in name]
    scales = [1.0]
    for name, value in numbers.items():
        if "cap" not in name:
            both = [1 / value, value] if name in _DIVISORS else [value, 1 / value]
            scales = [*both, *scales]
    for cap in (*caps, None):
        for scale in scales:
            yield Behind(scale, cap)


def _name(model: PreTrainedModel) -> str:
    kind = f"the architecture {model.config.model_type!r}"
    return f"{model.name_or_path} ({kind})" if model.name_or_path else kind


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _refused(model: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"{_name(model)} cannot be read as backbone and head ({why}): docs/families.md lists "
        "the architectures that can"
    )
