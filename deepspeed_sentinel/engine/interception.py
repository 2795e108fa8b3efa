"""The four wrapped instructions: every message is read, and tampered with where faults are injected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from deepspeed_sentinel.attacks.faults import Faults
from deepspeed_sentinel.engine.access import as_tuple, floating
from deepspeed_sentinel.engine.trace import span
from deepspeed_sentinel.evidence.keeping import Keeping
from deepspeed_sentinel.evidence.parts import describe
from deepspeed_sentinel.evidence.probe import End, Probe
from deepspeed_sentinel.evidence.table import RECEIVED, SENT
from deepspeed_sentinel.mesh import BACKWARD, DIRECTIONS, FORWARD

Tensors = Sequence[torch.Tensor]


class Interception:
    """Reads each message at once where DeepSpeed has it in hand, since it reuses the buffers.

    Only training schedules are watched: ``eval_batch`` runs the same instructions, but passes through.

    Attributes:
        watching: whether messages are read.
        lenient: leave it to DeepSpeed to raise about messages that it cannot train with.

    Args:
        engine: whose messages.
        probe, keeping: which read them.
        faults: to inject.
        lenient: see above.
    """

    def __init__(
        self, engine: PipelineEngine, probe: Probe, keeping: Keeping, faults: Faults, *, lenient: bool
    ) -> None:
        self._engine = engine
        self._probe = probe
        self._keeping = keeping
        self._faults = faults
        self.lenient = lenient
        self.watching = False
        self._original = dict(engine._INSTRUCTION_MAP)

    def instructions(self) -> dict[type, Callable[..., Any]]:
        """Wrapped entries for an engine's ``_INSTRUCTION_MAP``."""
        return {
            schedule.SendActivation: self._send_activation,
            schedule.RecvActivation: self._receive_activation,
            schedule.SendGrad: self._send_gradient,
            schedule.RecvGrad: self._receive_gradient,
        }

    def run_original(self, instruction: type, **kwargs: Any) -> None:
        MethodType(self._original[instruction], self._engine)(**kwargs)

    def _send_activation(self, engine: PipelineEngine, buffer_id: int) -> None:
        outputs = engine.pipe_buffers["outputs"]
        if not self.watching:
            return self.run_original(schedule.SendActivation, buffer_id=buffer_id)
        kept = outputs[buffer_id]
        if not self.lenient:
            self._check_differentiable(as_tuple(kept))
        wire = self._observe_sent(FORWARD, as_tuple(kept))
        # The graph keeps the true output; only what crosses the link is tampered with.
        outputs[buffer_id] = wire[0] if isinstance(kept, torch.Tensor) else tuple(wire)
        try:
            self.run_original(schedule.SendActivation, buffer_id=buffer_id)
        finally:
            outputs[buffer_id] = kept

    def _receive_activation(self, engine: PipelineEngine, buffer_id: int) -> None:
        self.run_original(schedule.RecvActivation, buffer_id=buffer_id)
        if self.watching:
            self._observe_received(FORWARD, as_tuple(engine.pipe_buffers["inputs"][buffer_id]))

    def _send_gradient(self, engine: PipelineEngine, buffer_id: int) -> None:
        inputs = floating(engine.pipe_buffers["inputs"][buffer_id])
        if self.watching and not (self.lenient and any(tensor.grad is None for tensor in inputs)):
            gradients = self._gradients(as_tuple(engine.pipe_buffers["inputs"][buffer_id]))
            wire = self._observe_sent(BACKWARD, gradients)
            for tensor, gradient in zip(inputs, wire, strict=True):
                if gradient is not tensor.grad:
                    tensor.grad = gradient
        self.run_original(schedule.SendGrad, buffer_id=buffer_id)

    def _receive_gradient(self, engine: PipelineEngine, buffer_id: int) -> None:
        self.run_original(schedule.RecvGrad, buffer_id=buffer_id)
        if self.watching:
            self._observe_received(BACKWARD, as_tuple(engine.grad_layer))

    def _observe_sent(self, direction: int, message: Tensors) -> Tensors:
        end = (direction, SENT)
        micro_batch = self._probe.next_micro_batch(end)
        message = self._tamper("compute", direction, micro_batch, message)
        self._observe(end, micro_batch, message)
        return self._tamper("transit", direction, micro_batch, message)

    def _observe_received(self, direction: int, message: Tensors) -> None:
        end = (direction, RECEIVED)
        micro_batch = self._probe.next_micro_batch(end)
        if self._faults:
            self._faults.enter(DIRECTIONS[direction], micro_batch, message)
        self._observe(end, micro_batch, self._tamper("report", direction, micro_batch, message))

    def _observe(self, end: End, micro_batch: int, message: Tensors) -> None:
        with span("observe"):
            self._probe.observe(end, micro_batch, message)
            self._keeping.observe(end, micro_batch, message)
        forged = self._tamper("sketch", end[0], micro_batch, message)
        if forged is not message:
            self._probe.forge_sketch(end, micro_batch, forged)

    def _tamper(self, where: str, direction: int, micro_batch: int, message: Tensors) -> Tensors:
        if not self._faults:
            return message
        return self._faults.apply(where, DIRECTIONS[direction], self._engine.global_steps, micro_batch, message)

    def _check_differentiable(self, message: Tensors) -> None:
        """DeepSpeed will want to run backward from every floating-point tensor of a message that it sends."""
        for index, tensor in enumerate(message):
            if tensor.is_floating_point() and not tensor.requires_grad:
                raise ValueError(
                    f"stage {self._engine.stage_id} sends tensor {index} of a message, {describe(tensor)}, that does "
                    "not require a gradient, but DeepSpeed runs backward from every floating-point tensor. If it is a "
                    "mask or an index, send it as integers or bools; if all that it comes from is frozen, call "
                    "requires_grad_() on it."
                )

    def _gradients(self, message: Tensors) -> Tensors:
        """The gradients that DeepSpeed is about to send, one for each floating-point tensor of a message."""
        gradients = []
        for index, tensor in enumerate(message):
            if not tensor.is_floating_point():
                continue
            if tensor.grad is None:
                raise ValueError(
                    f"stage {self._engine.stage_id} has no gradient for tensor {index} of the message that it "
                    f"received, {describe(tensor)}: it does not use it, or not in a way that can be differentiated, "
                    "and DeepSpeed sends a gradient back for every floating-point tensor. Send it as integers or bools "
                    "(a mask as bool), or do not send it to this stage."
                )
            gradients.append(tensor.grad)
        return gradients
