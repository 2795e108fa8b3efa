"""Where a causal LM can be cut: the pieces that its declared pipeline plan names, in the order data flows.

A plan is sufficient when two things hold. Every parameter is inside a piece. And the base model without its pieces
does nothing: what enters as ``inputs_embeds`` leaves unchanged, so that each stage can run the model's own forward
with the pieces of other stages left out, and masks, rotary embeddings and attention types come out as the model
itself makes them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_PROBE_TOKENS = 4


class PassThrough(nn.Module):
    """Stands where a piece of another stage was: hands on the hidden state it is given.

    What else the model's forward reads from the piece (a layer's attention type, say) is still there.
    """

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that it is no submodule: its parameters are not this stage's
        self._piece = (piece,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_piece"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


@dataclass(frozen=True)
class Plan:
    """The pieces of one model.

    Attributes:
        pieces: module names in the order data flows: embedding, decoder layers, final norm, head.
        layers: which of them are decoder layers, as a range of indices.
        embedding: name of the piece that holds the token embedding.
        tied: (parameter, parameter) names that are one tensor: the head's and the embedding's; or None.
    """

    pieces: tuple[str, ...]
    layers: range
    embedding: str
    tied: tuple[str, str] | None

    @property
    def head(self) -> str:
        return self.pieces[-1]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Plan:
        """Read and check a model's plan.

        Raises:
            ValueError: the model has no plan, or something in it cannot be split; names what and why.
        """
        name = type(model).__name__
        config = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise _refusal(name, "it is an encoder-decoder model, and only decoder-only causal LMs can be a pipeline")
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise _refusal(name, "it is not a causal LM: load it with AutoModelForCausalLM")
        if getattr(model, "hf_quantizer", None) is not None:
            raise _refusal(name, "it is quantized, and quantized weights cannot be trained here")
        base_plan = getattr(model.base_model.config, "base_model_pp_plan", None)
        if not base_plan:
            raise _refusal(name, f"{type(config).__name__} declares no base_model_pp_plan")

        base = model.base_model_prefix
        pieces: list[str] = []
        layers: range | None = None
        for entry in base_plan:
            module = getattr(model.base_model, entry, None)
            if module is None:
                raise _refusal(name, f"its plan names {entry!r}, which the base model does not have")
            if isinstance(module, nn.ModuleList):
                if layers is not None:
                    raise _refusal(name, f"its plan has a second list of layers, {entry!r}")
                layers = range(len(pieces), len(pieces) + len(module))
                pieces += [f"{base}.{entry}.{index}" for index in range(len(module))]
            else:
                pieces.append(f"{base}.{entry}")
        if layers is None:
            raise _refusal(name, f"its plan names no list of decoder layers, only {list(base_plan)}")
        pieces.append(_name_of(model, model.get_output_embeddings(), "output embedding (lm_head)"))
        embedding = _name_of(model, model.get_input_embeddings(), "input embedding")
        if embedding != pieces[0]:
            raise _refusal(name, f"its plan begins with {pieces[0]!r}, not with the token embedding {embedding!r}")
        plan = cls(tuple(pieces), layers, embedding, _tied(model, embedding, pieces[-1]))
        plan._check_complete(model)
        return plan

    def _check_complete(self, model: PreTrainedModel) -> None:
        outside = [
            parameter
            for parameter, _ in model.named_parameters()
            if not any(parameter.startswith(f"{piece}.") for piece in self.pieces)
        ]
        if outside:
            raise _refusal(
                type(model).__name__, f"{', '.join(outside)} would be needed on more than one stage: no plan names it"
            )
        problem = _what_remains(model, self)
        if problem:
            raise _refusal(
                type(model).__name__,
                f"its forward does more between the pieces than make masks and positions: without them {problem}",
            )


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"{name} cannot be split into pipeline stages: {reason}. Use a causal LM whose config declares a complete "
        "base_model_pp_plan, such as LlamaForCausalLM."
    )


def _name_of(model: PreTrainedModel, module: nn.Module | None, what: str) -> str:
    for name, candidate in model.named_modules(remove_duplicate=False):
        if candidate is module and name:
            return name
    raise _refusal(type(model).__name__, f"it has no {what}")


def _tied(model: PreTrainedModel, embedding: str, head: str) -> tuple[str, str] | None:
    tied = dict(model.all_tied_weights_keys)
    if not tied:
        return None
    expected = {f"{head}.weight": f"{embedding}.weight"}
    if tied != expected:
        raise _refusal(type(model).__name__, f"it ties {tied}, and only {expected} can be tied across stages")
    if [name for name, _ in model.get_submodule(head).named_parameters()] not in ([], ["weight"]):
        raise _refusal(type(model).__name__, f"{head} has parameters beside the tied weight")
    return f"{head}.weight", f"{embedding}.weight"


@torch.no_grad()
def _what_remains(model: PreTrainedModel, plan: Plan) -> str | None:
    """What the base model makes of a hidden state when all pieces are left out; None if it leaves it alone."""
    empty = hollow(model.base_model, plan, model.base_model_prefix)
    generator = torch.Generator().manual_seed(0)
    hidden = model.config.get_text_config().hidden_size
    x_BTD = torch.randn(1, _PROBE_TOKENS, hidden, generator=generator)
    try:
        left = empty(inputs_embeds=x_BTD, use_cache=False).last_hidden_state
    except Exception as error:
        # Whatever a forward may trip over without its pieces, the answer is the same: it cannot be split.
        return f"it fails with {type(error).__name__}: {error}"
    return None if torch.equal(left, x_BTD) else "the hidden state is changed"


def hollow(base: PreTrainedModel, plan: Plan, prefix: str) -> PreTrainedModel:
    """A copy of a base model without parameters: all pieces left out, buffers on the CPU and initialised."""
    inside = [name.removeprefix(f"{prefix}.") for name in plan.pieces if name.startswith(f"{prefix}.")]
    kept = {name: base.get_submodule(name) for name in inside}
    for name in inside:
        base.set_submodule(name, nn.Identity())
    try:
        empty = copy.deepcopy(base)
    finally:
        for name, module in kept.items():
            base.set_submodule(name, module)
    for name, module in kept.items():
        empty.set_submodule(name, PassThrough(module))
    initialise(empty, empty)
    return empty.float().eval()


@torch.no_grad()
def initialise(model: PreTrainedModel, module: nn.Module, seeds: Mapping[str, int] | None = None) -> None:
    """Give tensors of ``module`` that are on the meta device storage on the CPU and the values that ``model`` draws.

    Args:
        model: whose rules for initial values hold.
        module: the model or a part of it; parts left out stay as they are.
        seeds: random seed of each submodule of these names; what is outside them needs none.
    """
    if seeds:
        for name, seed in seeds.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                initialise(model, module.get_submodule(name))
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            part.to_empty(device="cpu", recurse=False)
            model._init_weights(part)
