"""Everything that is computed on one message: its statistics and J sketches of it, in two launches."""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.message_statistics import message_statistics
from deepspeed_sentinel.kernels.token_sketch import token_sketch


def observe_message(
    x_TD: torch.Tensor,
    seeds_J2: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    sketch_JmK: torch.Tensor,
    norms_Jm: torch.Tensor,
) -> None:
    """``message_statistics`` and ``token_sketch`` of one message; arguments and errors are theirs."""
    message_statistics(x_TD, column_sums_D, scalars_3, digest_2)
    token_sketch(x_TD, seeds_J2, sketch_JmK, norms_Jm)
