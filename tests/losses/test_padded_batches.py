"""`pack`: a padded batch gives the loss, the gradient and φ of the packed one, to the last bit."""

import pytest
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.losses import objective_names, pack, policy_loss

LENGTHS = (5, 0, 1, 9, 3)
WIDTH = 12


def padded_mask(side, seed=0):
    """bool [rows, WIDTH] with `LENGTHS` tokens per row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        if side == "holes":
            mask[row, torch.randperm(WIDTH, generator=generator)[:length]] = True
        else:
            start = {"right": 0, "left": WIDTH - length, "both": (WIDTH - length) // 2}[side]
            mask[row, start : start + length] = True
    return mask


def in_places(values, mask, rest):
    """`values [tokens]` where `mask` is true, row after row, and `rest` elsewhere: by a loop, apart from `pack`."""
    padded = torch.full(mask.shape, rest, dtype=values.dtype)
    taken = iter(values.tolist())
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if mask[row, column]:
                padded[row, column] = next(taken)
    return padded


def packed_batch(dtype):
    generator = torch.Generator().manual_seed(1)
    behavior = -torch.rand(sum(LENGTHS), generator=generator, dtype=dtype) - 0.5
    old = behavior + 0.1 * torch.randn(sum(LENGTHS), generator=generator, dtype=dtype)
    log_probs = old + 0.2 * torch.randn(sum(LENGTHS), generator=generator, dtype=dtype)
    advantages = torch.randn(len(LENGTHS), generator=generator, dtype=dtype)
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    return log_probs, behavior, old, advantages, offsets


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_padded_batch_has_the_loss_and_the_gradient_of_the_packed_one_to_the_last_bit(side, dtype):
    log_probs, behavior, old, advantages, offsets = packed_batch(dtype)
    mask = padded_mask(side)
    for name in objective_names():
        reference = log_probs.clone().requires_grad_()
        expected = policy_loss(reference, behavior, advantages, offsets, name=name, old_log_probs=old)
        expected.loss.backward()

        leaf = in_places(log_probs, mask, float("nan")).requires_grad_()
        packed = pack(leaf, mask, in_places(behavior, mask, 1e30), in_places(old, mask, float("inf")))
        mine, mu, pi_old = packed.values
        output = policy_loss(mine, mu, advantages, packed.cu_seqlens, name=name, old_log_probs=pi_old)
        output.loss.backward()

        assert torch.equal(packed.cu_seqlens, offsets) and packed.cu_seqlens.is_cpu
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(leaf.grad, in_places(reference.grad, mask, 0.0))
        assert torch.equal(packed.unpack(output.coefficient), in_places(expected.coefficient, mask, 0.0))


def test_gradients_flow_through_pack_and_back_through_unpack():
    mask = padded_mask("holes")
    leaf = torch.randn(mask.shape, dtype=torch.float64).requires_grad_()

    def there_and_back(padded):
        packed = pack(padded, mask)
        return packed.unpack(packed.values[0] ** 2, fill=7.0)

    found = there_and_back(leaf)
    assert torch.equal(found.detach(), torch.where(mask, leaf.detach() ** 2, 7.0))
    assert torch.autograd.gradcheck(there_and_back, (leaf,))


def test_a_batch_without_a_token_packs_to_empty_sequences():
    packed = pack(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool))
    assert packed.cu_seqlens.tolist() == [0, 0, 0, 0] and packed.values[0].shape == (0,)
    assert torch.equal(packed.unpack(packed.values[0]), torch.zeros(3, 4))
    nothing = pack(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))
    assert nothing.cu_seqlens.tolist() == [0] and nothing.unpack(nothing.values[0]).shape == (0, 4)


def test_a_view_that_is_not_contiguous_packs_as_its_copy_does():
    mask, values = padded_mask("both"), torch.randn(WIDTH, len(LENGTHS))
    assert torch.equal(pack(values.T, mask).values[0], pack(values.T.contiguous(), mask).values[0])


GOOD, MASK = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, GOOD), "mask: is of torch.float32"),
        ((GOOD, MASK.long()), "mask: is of torch.int64"),
        ((GOOD, None), "mask: is a NoneType"),
        ((GOOD, [[True]]), "mask: is a list"),
        ((GOOD[0], MASK[0]), r"mask: has shape \(3,\)"),
        ((GOOD[0], MASK), r"values: has shape \(3,\)"),
        (([[0.0]], MASK), "values: is a list"),
        ((GOOD, MASK, torch.zeros(2)), r"more\[0\]: has shape \(2,\)"),
        ((GOOD, MASK, GOOD, None), r"more\[1\]: is a NoneType"),
        ((GOOD.to("meta"), MASK), "values: is on meta"),
    ],
)
def test_what_cannot_be_packed_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        pack(*arguments)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.zeros(2, 3), 0.0])
def test_what_is_not_one_value_per_packed_token_is_not_unpacked(values):
    with pytest.raises(UserError, match=r"(?s)values: .*\[6\], one per packed token"):
        pack(GOOD, MASK).unpack(values)
