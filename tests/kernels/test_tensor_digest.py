import pytest
import torch

from deepspeed_sentinel.kernels.tensor_digest import _bits, tensor_digest, tensor_digest_reference


def tensors():
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-(1 << 62), 1 << 62, (3, 37), generator=generator)
    return {
        "mask": torch.rand(2, 1, 70, 70, generator=generator) < 0.5,
        "transposed mask": (torch.rand(9, 40, generator=generator) < 0.5).t(),
        "bytes": integers.to(torch.uint8),
        "shorts": integers.to(torch.int16),
        "ints": integers.to(torch.int32),
        "positions": integers,
        "one dimension": torch.randn(2100, generator=generator),
        "one column": torch.randn(300, 1, generator=generator).to(torch.bfloat16),
        "one element": torch.tensor(-3.5),
        "doubles": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "complex doubles": torch.randn(5, 7, generator=generator, dtype=torch.complex128),
        "halves": torch.randn(4, 3, generator=generator).to(torch.float16),
    }


@pytest.mark.parametrize("name", tensors())
def test_every_kind_of_tensor_has_the_digest_of_its_definition(device, name):
    x = tensors()[name]
    expected = tensor_digest_reference(_bits(x))
    assert torch.equal(tensor_digest(x.to(device)).cpu(), expected)
    changed = x.clone()
    flat = changed.view(-1) if changed.is_contiguous() else changed.t().view(-1)
    flat[0] = ~flat[0] if x.dtype == torch.bool else flat[0] + 1
    assert (tensor_digest(changed.to(device)).cpu() != expected).all()


def test_a_mask_is_read_where_it_lies():
    mask = torch.rand(1, 1, 64, 64) < 0.5
    assert _bits(mask).data_ptr() == mask.data_ptr()
