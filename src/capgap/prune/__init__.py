"""Structured pruning: importance of units, the shape of a wanted size, and the cut.

This file has what recipes and costs know of it, without torch: the scores of units and layers by
name, and what each costs.
"""

from typing import Literal, get_args

from capgap.errors import UserError

Method = Literal["first_order", "weights", "activation", "norm", "random"]
Depth = Literal["first_order", "influence", "ends"]
METHODS = get_args(Method)
DEPTHS = get_args(Depth)
# The method that a depth is measured with; `ends` needs none
_DEPTH_METHODS: dict[str, Method] = {"first_order": "first_order", "influence": "activation"}
# Operations of what reads text, by parameter and token: forward, and backward to the activations
# or to the weights too
_FLOPS = {"first_order": 4, "weights": 6, "activation": 2}
# Scored at once: many small batches say more than few large ones, since |gradient| is averaged over
# batches
SCORING_WINDOWS = 8


def layers_by(method: Method, depth: Depth | None) -> Method:
    """The method that scores the layers."""
    return _DEPTH_METHODS.get(depth or "", method)


def reading_methods(method: Method, depth: Depth | None) -> tuple[Method, ...]:
    """The methods among the two that read text, in a fixed order; none for norm and random."""
    asked = {method, layers_by(method, depth)}
    return tuple(one for one in METHODS if one in asked and one in _FLOPS)


def scoring_flops(method: Method, depth: Depth | None, total: int, tokens: int) -> int:
    """Floating-point operations of scoring a model of `total` parameters on `tokens`."""
    return sum(_FLOPS[one] for one in reading_methods(method, depth)) * total * tokens


def check_methods(method: str, depth: str | None) -> None:
    """UserError for a name that is none."""
    for kind, asked, known in (("method", method, METHODS), ("depth", depth, (None, *DEPTHS))):
        if asked not in known:
            names = ", ".join(str(one) for one in known if one)
            raise UserError(f"no importance {kind} {asked!r}: take one of {names}")
