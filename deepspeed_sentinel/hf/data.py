"""A Trainer's data, shared out by replica: all stages of a replica read the same."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader


def prepare_by_replica(accelerator: Accelerator, data_loader: DataLoader, replica: int, replicas: int) -> DataLoader:
    """``Accelerator.prepare_data_loader``, which shares out by process, for one replica.

    Batches stay on the host: there their shapes and masks are read without waiting for a device. Orders are drawn
    from seeds alone, so that all stages draw the same.
    """
    prepared = prepare_data_loader(
        data_loader,
        accelerator.device,
        num_processes=replicas,
        process_index=replica,
        put_on_device=False,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        even_batches=True,
        use_seedable_sampler=True,
        data_seed=accelerator.dataloader_config.data_seed,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    accelerator._dataloaders.append(prepared)
    return prepared
