"""Everything that is computed on one message: its statistics and J sketches of it, in two launches.

The first launch is the streaming read of ``message_statistics``. The second one both sketches the message and adds up
the partial results that the first one left: different programs of one grid, since each alone would be a launch for
almost no work.
"""

from __future__ import annotations

import torch

from deepspeed_sentinel.kernels.dispatch import KINDS, LAUNCH, runs_on_triton, tl, triton
from deepspeed_sentinel.kernels.keyed_digest import DigestKey, check_keyed
from deepspeed_sentinel.kernels.message_statistics import check_statistics, message_statistics
from deepspeed_sentinel.kernels.message_stream import REDUCED, launch_stream, plan_stream, reduce_partials
from deepspeed_sentinel.kernels.token_sketch import (
    SHAPE,
    check_sketch,
    sketch_arguments,
    sketch_programs,
    sketch_some_rows,
    token_sketch,
)


def observe_message(
    x_TD: torch.Tensor,
    seeds_J2: torch.Tensor,
    column_sums_D: torch.Tensor,
    scalars_3: torch.Tensor,
    digest_2: torch.Tensor,
    sketch_JmK: torch.Tensor,
    norms_Jm: torch.Tensor,
    copy_TD: torch.Tensor | None = None,
    key: DigestKey | None = None,
    keyed_1: torch.Tensor | None = None,
) -> None:
    """``message_statistics`` and ``token_sketch`` of one message; arguments and errors are theirs."""
    if not runs_on_triton(x_TD):
        message_statistics(x_TD, column_sums_D, scalars_3, digest_2, copy_TD, key, keyed_1)
        token_sketch(x_TD, seeds_J2, sketch_JmK, norms_Jm)
        return
    check_statistics(x_TD, column_sums_D, scalars_3, digest_2, copy_TD)
    check_keyed(x_TD, key, keyed_1)
    check_sketch(x_TD, seeds_J2, sketch_JmK, norms_Jm)
    plan = plan_stream(x_TD)
    launch_stream(x_TD, plan, copy_TD, key)
    sketchers = sketch_programs(x_TD, seeds_J2)
    _observe_kernel[(sketchers + plan.reducers,)](
        *sketch_arguments(x_TD, seeds_J2, sketch_JmK, norms_Jm),
        sketchers,
        plan.floats,
        plan.words,
        column_sums_D,
        scalars_3,
        digest_2,
        keyed_1,
        plan.groups,
        plan.programs,
        KIND=KINDS[x_TD.dtype],
        KEYED=key is not None,
        BLOCK=REDUCED,
        **SHAPE,
        num_warps=4,
        **LAUNCH,
    )


@triton.jit(
    do_not_specialize=["tokens", "rows", "sketchers", "groups", "programs"],
    do_not_specialize_on_alignment=["sums_ptr", "scalars_ptr", "digest_ptr", "keyed_ptr"],
)  # rows of buffers: any alignment
def _observe_kernel(
    x_ptr,
    seeds_ptr,
    sketch_ptr,
    norms_ptr,
    tokens,
    hidden,
    rows,
    stride_t,
    stride_d,
    sketch_j,
    sketch_m,
    sketch_k,
    norms_j,
    norms_m,
    sketchers,
    floats_ptr,
    words_ptr,
    sums_ptr,
    scalars_ptr,
    digest_ptr,
    keyed_ptr,
    groups,
    programs,
    KIND: tl.constexpr,
    KEYED: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
):
    program = tl.program_id(0)
    if program < sketchers:
        sketch_some_rows(
            program,
            x_ptr,
            seeds_ptr,
            sketch_ptr,
            norms_ptr,
            tokens,
            hidden,
            rows,
            stride_t,
            stride_d,
            sketch_j,
            sketch_m,
            sketch_k,
            norms_j,
            norms_m,
            KIND,
            BM,
            BLOCKS,
            K,
        )
    else:
        reduce_partials(
            program - sketchers,
            floats_ptr,
            words_ptr,
            sums_ptr,
            scalars_ptr,
            digest_ptr,
            keyed_ptr,
            hidden,
            groups,
            programs,
            KEYED,
            BLOCK,
        )
