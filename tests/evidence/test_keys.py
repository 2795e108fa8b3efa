import pytest
from everybody import everybodys_keys

from deepspeed_sentinel.errors import SentinelError
from deepspeed_sentinel.evidence.keys import BITS, Keys, private_key


def test_any_two_share_what_no_third_can_compute():
    keys = everybodys_keys(5)
    numbers = {}
    for one in range(5):
        for other in range(one):
            mine, theirs = keys[one].secret_with(other), keys[other].secret_with(one)
            assert mine.number("sample", 3) == theirs.number("sample", 3)
            numbers[one, other] = mine.number("sample", 3)
    assert len(set(numbers.values())) == len(numbers)


def test_each_purpose_has_a_number_of_its_own():
    secret = everybodys_keys(2)[0].secret_with(1)
    purposes = [("a",), ("b",), ("a", 1), ("a", 11), ("a", 1, 1), ("a", 1, 2), ("a", 2, 1)]
    numbers = [secret.number(*purpose) for purpose in purposes]
    assert len(set(numbers)) == len(purposes) and all(0 <= number < 2**BITS for number in numbers)
    assert numbers == [secret.number(*purpose) for purpose in purposes]


def test_a_seed_repeats_the_keys_and_none_does_not():
    assert private_key(7, 3).private_bytes_raw() == private_key(7, 3).private_bytes_raw()
    others = [private_key(7, 4), private_key(8, 3), private_key(None, 3), private_key(None, 3)]
    assert len({key.private_bytes_raw() for key in (private_key(7, 3), *others)}) == 5


def test_a_key_that_makes_secrets_known_to_everybody_is_refused_by_name():
    private = private_key(None, 0)
    keys = Keys(0, private, [private.public_key().public_bytes_raw(), bytes(32)])
    with pytest.raises(SentinelError, match=r"rank 1 gave 0000.* as its public key, which belongs to no key pair"):
        keys.secret_with(1)
