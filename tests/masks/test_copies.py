"""Copies and pickles of modules with masks are held as those whose masks were set here, in graphs and in other
processes too."""
from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moduli_kernels as mk
from tests.support.rnn_cases import quiet

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pruned(sparsity: float = 0.5) -> nn.Linear:
    layer = nn.Linear(6, 8)
    mk.MagnitudePruner([(layer, "weight")]).step_to(sparsity)
    return layer


def masked_gradients(layer: nn.Linear) -> torch.Tensor:
    return layer.weight.grad[~layer.weight_mask]


# --- graphs ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_gradients_of_a_copy_that_is_compiled_before_it_has_run_are_masked(how, fullgraph):
    twin = COPIES[how](pruned())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    run = torch.compile(twin, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        optimizer.zero_grad()
        run(torch.randn(4, 6)).sum().backward()
        assert masked_gradients(twin).eq(0).all() and twin.weight.grad[twin.weight_mask].ne(0).any()
        optimizer.step()
        assert twin.weight[~twin.weight_mask].eq(0).all()


def test_gradients_of_copies_that_are_compiled_one_by_one_are_masked():
    layers = [copy.deepcopy(pruned()) for _ in range(3)]
    for layer in layers:
        layer.compile(backend="aot_eager")
        layer(torch.randn(4, 6)).sum().backward()
    assert all(masked_gradients(layer).eq(0).all() for layer in layers)


def test_modules_that_are_held_share_their_graphs():
    counter, seen = CompileCounterWithBackend("eager"), []
    for layer in [pruned() for _ in range(3)]:
        layer.compile(backend=counter)
        layer(torch.randn(4, 6)).sum().backward()
        seen.append(counter.frame_count)
        assert masked_gradients(layer).eq(0).all()
    assert seen[0] > 0 and seen == [seen[0]] * 3


@pytest.mark.parametrize("how", [lambda layer: layer, *COPIES.values()])
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_weights_that_something_has_written(how, strict):
    layer = how(pruned())
    layer.weight.data.fill_(1)
    x = torch.randn(4, 6)
    program = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(program(x), nn.functional.linear(x, layer.weight_mask.float(), layer.bias))


# --- other processes ---------------------------------------------------------------------------------------------

IN_A_PROCESS_THAT_SETS_NO_MASK = """
import pickle, sys, torch
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
layer = pickle.load(sys.stdin.buffer)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
for _ in range(2):
    layer(torch.ones(3, 6)).sum().backward()
    layer.weight.data.add_(1)
    optimizer.step()
    assert layer.weight[~layer.weight_mask].eq(0).all(), "after a step"
average = AveragedModel(layer, use_buffers=True)
average.update_parameters(layer)
layer.weight_mask[:4] = False
average.update_parameters(layer)
assert torch.equal(average.module.weight_mask, layer.weight_mask), "in an average"
kept = layer.weight_mask.clone()
prune.random_unstructured(layer, "weight", 0.1)
assert not layer.weight_mask[~kept].any(), "by torch.nn.utils.prune"
print("held")
"""


def test_a_pickle_is_held_in_a_process_that_sets_no_mask_itself():
    command = [sys.executable, "-c", IN_A_PROCESS_THAT_SETS_NO_MASK]
    run = subprocess.run(command, input=pickle.dumps(pruned()), capture_output=True, check=False)
    assert run.stdout.strip() == b"held", run.stderr.decode()


def test_the_package_has_no_other_names_than_its_own():
    with pytest.raises(AttributeError, match="module 'moduli_kernels' has no attribute 'zero_before_lunch'"):
        mk.zero_before_lunch  # noqa: B018
