"""The tasks of the examples: navigation (walks, targets, decoding, loss) and the adding problem."""
import math

import pytest
import torch

import moduli_kernels as mk
from examples import adding, navigation


@pytest.fixture(scope="module")
def walk():
    return navigation.walks(2000, 30, generator=torch.Generator().manual_seed(0))


def test_walks_have_the_shapes_they_promise(walk):
    assert walk.start.shape == (2000, 2)
    assert walk.moves.shape == walk.positions.shape == (30, 2000, 2)


def test_positions_are_the_start_plus_the_moves_so_far(walk):
    torch.testing.assert_close(walk.positions, walk.start + walk.moves.cumsum(0), rtol=0, atol=1e-5)


def test_first_step_is_dropped():
    # With one step, two are drawn: the start lies one step from where the walker was put down.
    generator = torch.Generator().manual_seed(3)
    short = navigation.walks(4, 1, generator=generator)
    generator.manual_seed(3)
    torch.rand(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    put_down = (torch.rand(4, 2, generator=generator) - 0.5) * navigation.BOX
    first_step = (short.start - put_down).norm(dim=1)
    assert (first_step > 0).all() and (first_step < 0.15).all()


def test_walkers_stay_in_the_box_but_for_the_step_that_hits_a_wall(walk):
    beyond = walk.positions.abs().amax(dim=-1) - navigation.BOX / 2
    assert beyond.max() < 0.09  # Rayleigh: one step in 4 million is longer than 9 cm
    assert (beyond > 0).double().mean() < 0.01
    usual = walk.positions.abs().mean(dim=(0, 1))
    assert (usual - navigation.BOX / 4).abs().max() < 0.03  # they roam all of it


def test_speeds_are_rayleigh_and_headings_turn_as_stated(walk):
    # Walks that stay clear of all walls, at the start of every step.
    before = torch.cat((walk.start[None], walk.positions[:-1]))
    free = (before.abs() < navigation.BOX / 2 - navigation.WALL_ZONE).all(dim=-1).all(dim=0)
    moves = walk.moves[:, free].double()
    speed = moves.norm(dim=-1) / navigation.DT
    scale = 0.13 * 2 * math.pi
    assert speed.mean() == pytest.approx(scale * math.sqrt(math.pi / 2), rel=0.01)
    assert speed.square().mean() == pytest.approx(2 * scale**2, rel=0.02)
    heading = torch.atan2(moves[..., 1], moves[..., 0])
    turn = torch.remainder(heading.diff(dim=0) + math.pi, 2 * math.pi) - math.pi
    assert turn.mean().abs() < 0.005
    assert turn.std() == pytest.approx(5.76 * 2 * 0.02, rel=0.01)


def test_a_walker_that_heads_for_a_wall_slows_down_and_turns_along_it(monkeypatch):
    monkeypatch.setattr(navigation, "TURN_STD", 0.0)
    walk = navigation.walks(4000, 10, generator=torch.Generator().manual_seed(1))
    before = torch.cat((walk.start[None], walk.positions[:-1]))
    gap, axis = (navigation.BOX / 2 - before.abs()).min(dim=-1)
    outward = (walk.moves * before.sign()).gather(-1, axis[..., None])[..., 0]
    hits = (gap < navigation.WALL_ZONE) & (outward > 1e-6)
    assert hits.sum() > 100
    length = walk.moves.norm(dim=-1)
    assert length[hits].mean() / length[~hits].mean() == pytest.approx(0.25, rel=0.1)
    corner = (navigation.BOX / 2 - before.abs()).max(dim=-1).values < 0.1
    then = (hits & ~corner)[:-1]
    next_move = walk.moves[1:]
    across = next_move.gather(-1, axis[:-1][..., None])[..., 0].abs()
    assert (across[then] <= 1e-4 * next_move.norm(dim=-1)[then] + 1e-6).all()


def test_walks_follow_from_the_generator():
    a, b = (navigation.walks(5, 4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    c = navigation.walks(5, 4, generator=torch.Generator().manual_seed(8))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.moves, c.moves)


@pytest.fixture(scope="module")
def landmarks():
    return (torch.rand(512, 2, generator=torch.Generator().manual_seed(2)) - 0.5) * navigation.BOX


def test_targets_are_a_distribution_that_peaks_at_the_nearest_landmark(walk, landmarks):
    for some in (landmarks, landmarks[:32]):
        target = navigation.activation(walk.positions, some, 0.12)
        assert target.shape == (30, 2000, len(some))
        assert (target >= 0).all() and (target.amin(dim=-1) == 0).all()
        torch.testing.assert_close(target.sum(-1), torch.ones(30, 2000))
        assert torch.equal(target.argmax(-1), torch.cdist(walk.positions, some).argmin(-1))


def test_target_by_hand():
    # Squared distances 0, w^2 and 4 w^2: softmax of (0, -1/2, -2) less softmax of (0, -1/4, -1).
    width = 0.1
    marks = torch.tensor([[0.0, 0], [width, 0], [0, 2 * width]])
    target = navigation.activation(torch.zeros(1, 2), marks, width)
    narrow, wide = [1, math.exp(-0.5), math.exp(-2)], [1, math.exp(-0.25), math.exp(-1)]
    difference = [a / sum(narrow) - b / sum(wide) for a, b in zip(narrow, wide, strict=True)]
    raised = [d - min(difference) for d in difference]
    expected = torch.tensor([[r / sum(raised) for r in raised]])
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-7)


def test_decoding_perfect_activations_gives_a_small_error(walk, landmarks):
    # With the paper's 512 landmarks and 12 cm; this is near the paper's best error, 4.6 cm.
    decoded = navigation.decode(navigation.activation(walk.positions, landmarks, 0.12), landmarks)
    assert 0.02 < (decoded - walk.positions).norm(dim=-1).mean() < 0.05


def test_decode_is_the_mean_of_the_three_most_active():
    marks = torch.tensor([[0.0, 0], [3, 0], [0, 6], [100, 100]])
    assert navigation.decode(torch.tensor([5.0, 4, 3, -1]), marks).tolist() == [1, 2]


def test_soft_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)]], [[1.0, 1.0]]])  # probabilities (1/4, 3/4) and (1/2, 1/2)
    target = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    expected = (0.5 * math.log(4) + 0.5 * math.log(4 / 3) + math.log(2)) / 2
    assert navigation.soft_cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-6)


def navigation_task(seed=0):
    return navigation.NavigationTask(hidden=24, landmarks=32, width_cm=20, steps=6, batch=10, seed=seed)


def test_navigation_net_is_the_papers_recurrence():
    task = navigation_task()
    (batch,) = task.batches(1)
    start = navigation.activation(batch.start, task.landmarks, 0.2)
    net = task.model
    state = start @ net.encoder.weight.t()
    for t, move in enumerate(batch.moves):
        state = torch.relu(state @ net.rnn.weight_hh_l0.t() + move @ net.rnn.weight_ih_l0.t())
        torch.testing.assert_close(task.logits(batch)[t], state @ net.decoder.weight.t())
    assert sorted(name for name, _ in net.named_parameters()) == [
        "decoder.weight", "encoder.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0"]


def test_navigation_error_of_a_net_that_knows_is_what_decoding_leaves(monkeypatch):
    task = navigation_task()
    monkeypatch.setattr(task, "logits", lambda batch: task.activation(batch.positions))
    by_hand = 100 * (task.decoded(task.test) - task.test.positions).norm(dim=-1).mean().item()
    perfect = task.references()["perfect activations, decoded"]
    assert task.error() == pytest.approx(by_hand) == pytest.approx(perfect)


def test_nets_of_a_seed_see_the_same_world():
    a, b, other = navigation_task(), navigation_task(), navigation_task(seed=1)
    assert torch.equal(a.landmarks, b.landmarks) and torch.equal(a.test.moves, b.test.moves)
    assert torch.equal(a.model.encoder.weight, b.model.encoder.weight)
    assert all(torch.equal(x.moves, y.moves) for x, y in zip(a.batches(3), b.batches(3), strict=True))
    assert not torch.equal(a.landmarks, other.landmarks)


def test_batches_are_fresh():
    task = navigation_task()
    drawn = [batch.moves for _ in range(2) for batch in task.batches(2)]
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_adding_targets_are_the_sums_of_the_marked_numbers():
    problems = adding.sums(500, 50, generator=torch.Generator().manual_seed(0))
    numbers, marks = problems.inputs.unbind(-1)
    assert problems.inputs.shape == (50, 500, 2)
    assert set(marks.unique().tolist()) == {0.0, 1.0}
    assert (marks.sum(0) == 2).all()
    assert (0 <= numbers).all() and (numbers < 1).all()
    torch.testing.assert_close(problems.target, (numbers * marks).sum(0))


def test_adding_marks_are_uniform_over_pairs_of_places():
    problems = adding.sums(60_000, 4, generator=torch.Generator().manual_seed(0))
    codes = (problems.inputs[..., 1] * torch.tensor([1.0, 2, 4, 8])[:, None]).sum(0).long()
    counts = torch.bincount(codes, minlength=16)
    pairs = [3, 5, 9, 6, 10, 12]
    assert counts.sum() == counts[pairs].sum()
    assert (counts[pairs] / 10_000 - 1).abs().max() < 0.05


def test_always_answering_one_gives_the_papers_baseline():
    problems = adding.sums(50_000, 50, generator=torch.Generator().manual_seed(0))
    assert (problems.target - 1).square().mean().sqrt().item() == pytest.approx(math.sqrt(1 / 6), rel=0.02)


def test_adder_is_a_cell_on_input_and_state_together():
    task = adding.AddingTask(hidden=16, steps=7, batch=5, seed=0, device="cpu", tests=20)
    (batch,) = task.batches(1)
    net, state = task.model, torch.zeros(5, 16)
    joint = torch.cat((net.rnn.weight_ih_l0, net.rnn.weight_hh_l0), dim=1)
    assert joint.abs().max() <= 18**-0.5 and joint.abs().max() > 0.95 * 18**-0.5  # nn.Linear(18, 16)'s start
    for x in batch.inputs:
        state = torch.relu(torch.cat((x, state), dim=1) @ joint.t() + net.rnn.bias_ih_l0)
    torch.testing.assert_close(net(batch.inputs), net.readout(state)[:, 0])


def test_adder_has_one_bias_also_after_a_fresh_start():
    task = adding.AddingTask(hidden=16, steps=7, batch=5, seed=0, device="cpu", tests=20)
    pruner, before = mk.MagnitudePruner(task.pruned()), task.model.rnn.bias_ih_l0.clone()
    mk.reinitialize_(task.model, pruner)
    rnn = task.model.rnn
    assert (rnn.bias_hh_l0 == 0).all() and not rnn.bias_hh_l0.requires_grad
    assert not torch.equal(rnn.bias_ih_l0, before) and rnn.weight_hh_l0.abs().max() <= 18**-0.5


def test_adding_penalty_is_on_the_recurrent_weights_only():
    task = adding.AddingTask(hidden=16, steps=7, batch=5, seed=0, device="cpu", tests=20)
    mk.regularize(task.model, task.targets(), manifold="torus", strength=1.0)().backward()
    assert task.model.rnn.weight_ih_l0.grad is None
    assert (task.model.rnn.weight_hh_l0.grad != 0).double().mean() > 0.9
