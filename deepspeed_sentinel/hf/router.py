"""The load-balancing loss of mixture-of-experts models, carried along a pipeline.

The loss (Switch Transformer, arXiv 2101.03961, as in transformers' ``load_balancing_loss_func``) is
``E * sum_e (tokens_e / rows) * (probability_e / rows)``, where tokens_e counts assignments to expert e,
probability_e sums its routing probabilities, both over the tokens of *all* layers. The three are sums over layers,
so each stage adds its own to a small vector that travels beside the hidden state, and the last stage takes the
product. A gradient flows back through the probabilities only, as in the unsplit model.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


@dataclass(frozen=True)
class Router:
    """What the loss needs to know of a model.

    Attributes:
        experts: number of experts E.
        top_k: experts a token is sent to.
        coefficient: weight of the loss beside the language modelling loss.
    """

    experts: int
    top_k: int
    coefficient: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Router | None:
        """The router whose loss ``model`` adds to its own; None if it adds none.

        Raises:
            ValueError: the model adds a router loss of another kind.
        """
        if not getattr(model.config, "output_router_logits", False):
            return None
        function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        same = function is not None and inspect.getsource(function) == inspect.getsource(load_balancing_loss_func)
        needed = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
        if not same or not all(hasattr(model, name) for name in needed):
            raise ValueError(
                f"the router loss of {type(model).__name__} is not the one of Mixtral, and no other can be carried "
                "along the pipeline. Set config.output_router_logits to False to train without it."
            )
        return cls(model.num_experts, model.num_experts_per_tok, model.router_aux_loss_coef)

    def nothing(self, device: torch.device) -> torch.Tensor:
        """The vector before the first layer: float32 [2E + 1].

        A leaf of its own, so that a stage whose layers have no router can still be asked for its gradient.
        """
        return torch.zeros(2 * self.experts + 1, device=device, requires_grad=torch.is_grad_enabled())

    def add(self, sums_N: torch.Tensor, logits: tuple[torch.Tensor, ...], mask_BT: torch.Tensor | None) -> torch.Tensor:
        """The vector after these layers.

        Args:
            sums_N: float32 [2E + 1]: assignments, probabilities, rows.
            logits: of each layer, [B * T, E].
            mask_BT: which tokens count; None for all.
        """
        for layer_KE in logits:
            probabilities_KE = layer_KE.softmax(dim=-1)
            chosen_KE = torch.zeros_like(probabilities_KE, dtype=torch.float32)
            chosen_KE.scatter_(1, probabilities_KE.topk(self.top_k, dim=-1).indices, 1.0)
            probabilities_KE = probabilities_KE.float()
            weights_K1 = torch.ones_like(chosen_KE[:, :1]) if mask_BT is None else mask_BT.reshape(-1, 1).float()
            own = [(chosen_KE * weights_K1).sum(0), (probabilities_KE * weights_K1).sum(0), weights_K1.sum(0)]
            sums_N = sums_N + torch.cat(own)
        return sums_N

    def loss(self, sums_N: torch.Tensor) -> torch.Tensor:
        """The loss of all layers, times its coefficient."""
        tokens_E, probabilities_E, rows_1 = sums_N.split([self.experts, self.experts, 1])
        return self.coefficient * self.experts * ((tokens_E / rows_1) * (probabilities_E / rows_1)).sum()
