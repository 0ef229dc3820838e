"""Halves of a batch side by side compute what the whole batch does, whichever of the two comes first."""

import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch

import mae
from mae import config
from mae.data.batch import Batch
from mae.nets.precision import computing
from mae.training import blocks, halves
from mae.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SEPARABLE = ["mae", "crossmae", "ae", "denoising"]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batch_of(count):
    numbers = torch.arange(count)
    return Batch(torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), numbers + 5, numbers, numbers, 0, 0)


def passes(method, precision="fp32", *, slower=None):
    """What the loop does with a part of a step; the half that begins with the key `slower` waits for the other."""

    def work(batch, parts):
        if batch.keys[0] == slower:
            time.sleep(0.05)
        with computing(precision, ALONE.device):
            output = method(batch.images, keys=batch.keys)
        (output.loss / parts).backward()
        return {k: v / parts for k, v in {"loss": output.loss.detach(), **output.metrics}.items()}

    return work


def gradients(method):
    found = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    method.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SEPARABLE)
def test_they_give_the_figures_and_gradients_of_the_whole_batch(name, precision):
    method, batch, train = mae.create([f"configs/methods/{name}.yaml"]).train(), batch_of(12), config.load([]).train
    whole = passes(method, precision)(batch, 1)
    expected, found = gradients(method), []
    for slower in (None, 5, 11):  # neither half, the first, the second
        with halves.side_by_side(passes(method, precision, slower=slower), method, train, ALONE) as both:
            figures = both(batch, 1)
        found.append((figures, gradients(method)))
    close = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.1, "atol": 0.02 * float(whole["loss"])}
    for figures, own in found:
        torch.testing.assert_close(figures, whole, rtol=close["rtol"] / 10, atol=1e-7)
        torch.testing.assert_close(own, expected, **close)
    for (figures, own), (others, theirs) in itertools.pairwise(found):  # to the bit
        assert all(figures[k] == others[k] for k in figures)
        assert all(torch.equal(own[k], theirs[k]) for k in own)


def test_recomputation_changes_no_bit_of_them():
    method, batch, train = mae.create([]).train(), batch_of(12), config.load([]).train
    found = []
    for _ in range(2):
        with halves.side_by_side(passes(method), method, train, ALONE) as both:
            both(batch, 1)
        found.append(gradients(method))
        blocks.recompute(method, True)
    kept, computed_again = found
    assert all(torch.equal(kept[name], computed_again[name]) for name in kept)


def test_each_has_half_of_the_threads_and_everyone_else_as_many_as_before():
    method, train = mae.create([]), config.load([]).train
    seen = []

    def work(batch, parts):
        (torch.ones(300, 300) @ torch.ones(300, 300)).exp()  # an operation in parallel, after which torch has made up its mind
        time.sleep(0.1)  # the other half is not waited for
        seen.append((threading.get_ident(), torch.get_num_threads(), len(batch.images), parts))
        return {}

    with halves.side_by_side(work, method, train, ALONE) as both:
        both(batch_of(6), 1)
        new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        new.start()
        new.join()
    (one, *first), (other, *second), later = seen
    assert len({one, other, threading.get_ident()}) == 3
    assert first == second == [1, 3, 2]
    assert later == torch.get_num_threads() == 2
    assert not any(thread.ident in (one, other) for thread in threading.enumerate())


def test_an_error_of_one_half_is_raised_when_the_other_is_done():
    done = []

    def work(batch, parts):
        if batch.keys[0] == 5:
            raise ValueError("of the first half")
        time.sleep(0.1)
        done.append(True)
        return {}

    with halves.side_by_side(work, mae.create([]), config.load([]).train, ALONE) as both:
        with pytest.raises(ValueError, match="of the first half"):
            both(batch_of(4), 1)
        assert done


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["configs/methods/vae.yaml"], ALONE),
        (["configs/methods/kl_ae.yaml"], ALONE),
        (["configs/methods/denoising.yaml", "method.corruption=patch_pca"], ALONE),
        (["train.accumulate=2"], ALONE),
        (["train.compile=true"], ALONE),
        (["train.precision=fp16"], ALONE),
        (["train.batch_size=255"], ALONE),
        ([], Ranks(0, 2, torch.device("cpu"))),
        ([], Ranks(0, 1, torch.device("cuda"))),
    ],
)
def test_what_cannot_be_halved_is_taken_whole(words, ranks):
    assert not halves.possible(mae.create(words), config.load(words).train, ranks)


def test_nor_is_what_has_a_state_or_draws_at_random():
    method, train = mae.create([]), config.load([]).train
    assert halves.possible(method, train, ALONE)
    assert not halves.possible(method, replace(train, batch_size=1), ALONE)
    for extra in (torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.1)):
        method.extra = extra
        assert not halves.possible(method, train, ALONE)
    torch.set_num_threads(1)
    assert not halves.possible(mae.create([]), train, ALONE)


def test_only_methods_that_leave_nothing_behind_say_so():
    names = sorted(path.stem for path in (config.configs_folder() / "methods").glob("*.yaml"))
    assert [name for name in names if mae.create([f"configs/methods/{name}.yaml"]).separable] == sorted(SEPARABLE)
