"""Losses of a block, by hand; item numbers are those of the method's test list."""

from types import SimpleNamespace

import pytest
import torch
from tasks import tasks_of
from tiny import images, make_source, run_steps, smooth_images

from vitcompress.engine.cache import CachedRows
from vitcompress.errors import UnsupportedModelError
from vitcompress.graph.patterns import Block
from vitcompress.passes.blocks import FloatRest
from vitcompress.passes.losses import (
    LOSSES,
    TEMPERATURE,
    AnswersLoss,
    GlobalLocal,
    LeastSquaresHessian,
    LowRankFisher,
    MeanSquaredError,
    answers_divergence,
)

IMAGES, TOKENS, CHANNELS, CLASSES = 12, 3, 4, 5
EVERYTHING = torch.arange(IMAGES)
WEIGHTED = ["fisher_diagonal", "aph", "fima", "least_squares"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(values):
    return CachedRows(values.clone(), False, torch.device("cpu"))


def toy_task(blind_channel=None):
    """A block ``x -> x``, quantized as ``x -> x + error``, before a linear classifier."""
    head = noise(TOKENS * CHANNELS, CLASSES, seed=1).reshape(TOKENS, CHANNELS, CLASSES)
    if blind_channel is not None:
        head[:, blind_channel] = 0.0
    z = noise(IMAGES, TOKENS, CHANNELS, seed=2)

    def logits(output):
        return 20.0 * torch.einsum("bnc,nco->bo", output, head)

    return SimpleNamespace(
        path="toy",
        float_inputs=(rows_of(z),),
        targets=rows_of(z),
        answers=rows_of(logits(z)),
        training=IMAGES,
        batches=lambda: list(EVERYTHING.split(5)),
        rest=SimpleNamespace(logits=logits, features=lambda output: output[:, 0]),
        new_rows=lambda shape: rows_of(torch.zeros(IMAGES, *shape)),
    )


def quantized_toy(x):
    return x + 0.1 * noise(*x.shape, seed=3)


def prepared(name, task):
    loss = LOSSES[name]()
    loss.prepare(task, quantized_toy)
    return loss


def value(loss, output, target):
    return loss(output, target, EVERYTHING[: len(target)]).item()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_at_first_and_zero_without_error(name):
    task = toy_task()
    loss, z = prepared(name, task), task.targets.take(EVERYTHING)

    first = value(loss, z + 0.1 * noise(*z.shape), z)

    terms = {"fima": 2.0, "global_local": 3.0}
    assert first == pytest.approx(terms.get(name, 1.0), rel=1e-5)
    assert value(loss, z + 0.2 * noise(*z.shape), z) == pytest.approx(4.0 * first, rel=1e-4)
    assert value(loss, z, z) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_a_gradient_that_reduces_it(name):
    task = toy_task()
    loss, z = prepared(name, task), task.targets.take(EVERYTHING)
    output = (z + 0.1 * noise(*z.shape)).requires_grad_()

    before = loss(output, z, EVERYTHING)
    before.backward()

    step = 1e-3 * output.grad / output.grad.norm()
    assert value(loss, output.detach() - step, z) < before.item()


@pytest.mark.parametrize("name", WEIGHTED)
def test_errors_that_no_answer_shows_weigh_nothing(name):
    task = toy_task(blind_channel=2)
    loss, z = prepared(name, task), task.targets.take(EVERYTHING)
    seen, blind = (0.1 * noise(*z.shape) for _ in range(2))
    seen[..., 2], blind[..., [0, 1, 3]] = 0.0, 0.0

    weight = value(loss, z + seen, z)

    assert abs(value(loss, z + blind, z)) < 1e-3 * weight
    plain = MeanSquaredError()
    value(plain, z + seen, z)
    assert value(plain, z + blind, z) > 0.1


def test_the_low_rank_fisher_by_hand():
    loss = LowRankFisher()
    loss._gradients, loss._errors = [], []
    g, d = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])

    loss.observe(g, d)

    r = torch.tensor([[0.5, -1.0]])
    low_rank = (0.5 * 1.0 + 1.0 * 2.0) ** 2 / 25.0
    diagonal = (0.25 * 1.0 + 1.0 * 2.0) / 2.0
    zero = torch.zeros(1, 2)
    assert value(loss, r, zero) == pytest.approx(2.0)
    assert loss._first["low rank"].item() == pytest.approx(low_rank, rel=1e-5)
    assert loss._first["diagonal"].item() == pytest.approx(diagonal, rel=1e-5)


def test_a_refresh_of_the_fisher_adds_a_direction_and_starts_the_scale_anew():
    task = toy_task()
    loss, z = prepared("fima", task), task.targets.take(EVERYTHING)
    value(loss, z + 1.0, z)

    loss.refresh(task, lambda x: x + 0.05 * noise(*x.shape, seed=9))

    assert len(loss._gradients) == 2
    assert value(loss, z + 0.1 * noise(*z.shape), z) == pytest.approx(2.0, rel=1e-5)


def test_the_low_rank_fisher_is_zero_without_error_and_above_zero_with_any():
    task = toy_task()
    loss, z = prepared("fima", task), task.targets.take(EVERYTHING)
    loss.refresh(task, lambda x: x + 0.05 * noise(*x.shape, seed=9))
    value(loss, z + 0.1 * noise(*z.shape), z)

    assert value(loss, z, z) == 0.0
    for element in range(TOKENS * CHANNELS):
        error = torch.zeros(TOKENS * CHANNELS)
        error[element] = 1e-3
        assert value(loss, z + error.reshape(TOKENS, CHANNELS), z) > 0.0
    for seed in range(20):
        assert value(loss, z + noise(*z.shape, seed=seed), z) > 0.0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_the_fisher_does_not_mind_the_scale_of_errors(scale):
    loss = LowRankFisher()
    loss._gradients, loss._errors = [], []
    for seed in (1, 2, 3):
        loss.observe(noise(6, seed=seed).abs(), scale * noise(6, seed=seed + 9).abs())

    found = value(loss, noise(4, 6), torch.zeros(4, 6))

    assert found == pytest.approx(2.0, rel=1e-4)
    assert loss._first["low rank"].item() > 0.0


def test_the_least_squares_loss_by_hand():
    loss = LeastSquaresHessian()
    loss.use(torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0]))

    value(loss, torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))

    # (2 * 1 + 0.5 * 4 + (1 - 2)^2) / 2
    assert loss._first["error"].item() == pytest.approx(2.5)


def test_the_global_half_sees_what_the_classifier_reads():
    task = toy_task()
    loss, z = GlobalLocal(), task.targets.take(EVERYTHING)
    loss.prepare(task, quantized_toy)
    value(loss, z + 1.0, z)
    behind, first = torch.zeros_like(z), torch.zeros_like(z)
    behind[:, 1], first[:, 0] = 1.0, 1.0

    # Features are the first token: an error in another one is local alone.
    assert value(loss, z + behind, z) == pytest.approx(2.0 / TOKENS)
    assert value(loss, z + first, z) == pytest.approx(1.0 + 2.0 / TOKENS)


def test_answers_are_compared_by_their_divergence():
    expected, found = noise(6, CLASSES), noise(6, CLASSES, seed=1)

    divergence = answers_divergence(found, expected, TEMPERATURE)

    p = torch.softmax(expected / TEMPERATURE, dim=1)
    q = torch.softmax(found / TEMPERATURE, dim=1)
    expected_divergence = (p * (p / q).log()).sum(dim=1).mean().item()
    assert divergence.item() == pytest.approx(expected_divergence, rel=1e-4)
    loss = AnswersLoss()
    assert value(loss, found, expected) == pytest.approx(1.0)
    assert value(loss, expected, expected) == pytest.approx(0.0, abs=1e-6)


# The float rest of a network


@pytest.fixture(scope="module")
def quantized(vit_graph):
    rules = [{"roles": ["weight", "patch_input", "head_input"], "bits": 4}]
    steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}]
    return run_steps(steps, vit_graph, make_source(images(4)))[0]


def test_the_rest_takes_a_blocks_float_output_to_the_answers(quantized, vit_graph):
    x = smooth_images(12, seed=11)

    def use(task):
        z = task.targets.take(EVERYTHING)
        return task.rest.logits(z), task.rest.features(z) if not task.is_last else None

    found = tasks_of(quantized.clone(), vit_graph, use)

    head = vit_graph.parameter("head.weight"), vit_graph.parameter("head.bias")
    for path, (logits, features) in found.items():
        torch.testing.assert_close(logits, vit_graph(x), rtol=1e-4, atol=1e-5)
        if path != "head":
            answers = torch.nn.functional.linear(features, *head)
            torch.testing.assert_close(answers, vit_graph(x), rtol=1e-4, atol=1e-5)


def test_the_rest_passes_gradients(quantized, vit_graph):
    def use(task):
        z = task.targets.take(EVERYTHING).requires_grad_()
        task.rest.logits(z).square().sum().backward()
        return z.grad.abs().max().item()

    assert min(tasks_of(quantized.clone(), vit_graph, use).values()) > 0.0


def test_a_rest_that_reads_something_else_too_is_refused_by_name(vit_graph):

    norm = next(n for n in vit_graph.graph.nodes if n.meta["module"].path == "blocks.1.norm2")
    rest = FloatRest(vit_graph, Block("blocks.1.norm2", (norm,)), torch.device("cpu"))

    with pytest.raises(
        UnsupportedModelError, match=r"blocks\.1\.norm2: what follows also reads .*'mse'"
    ):
        rest.logits(torch.zeros(2, 17, 32))
