import math
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny import images, make_source
from torch import nn

from calib.tensors import TensorSource
from vitcompress.errors import InputError
from vitcompress.evaluate import evaluate, logits_of, onnx_predictor
from vitcompress.graph import OutputDict
from vitcompress.measure import measure_activations

#: Seven classes, four images.
FOUND = torch.tensor(
    [
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0],
        [0.0, 5.0, 4.0, 3.0, 2.0, 1.0, -1.0],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0],
    ]
)
#: Second, sixth, seventh and first place.
LABELS = torch.tensor([1, 0, 0, 3])


def table(logits, batch_size=3):
    """Return a source of images that name their row, and a model that looks it up."""
    rows = torch.arange(len(logits), dtype=torch.float32)[:, None, None, None]
    return rows, lambda x: logits[x.flatten().long()]


def measured(found, expected=None, labels=None, batch_size=3):
    rows, model = table(found)
    reference = None if expected is None else table(expected)[1]
    source = make_source(rows.expand(-1, 1, 1, 1), labels, batch_size=batch_size)
    return evaluate(model, source, reference=reference)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_accuracy_by_hand(batch_size):
    entry = measured(FOUND, labels=LABELS, batch_size=batch_size)

    assert entry.images == 4
    assert entry.labelled
    assert entry.top1_percent == 25.0
    assert entry.top5_percent == 50.0
    assert entry.agreement_percent is None
    assert entry.top1_drop_pp is None


def test_distances_from_a_reference_by_hand():
    expected = torch.tensor([[math.log(3.0), 0.0], [0.0, 1.0]])
    found = torch.tensor([[0.0, 0.0], [1.0, 0.0]])

    entry = measured(found, expected, labels=torch.tensor([0, 1]))

    p, q = 1 / (1 + math.e), math.e / (1 + math.e)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = p * math.log(p / q) + q * math.log(q / p)
    assert entry.agreement_percent == 50.0
    assert entry.mean_kl == pytest.approx((first + second) / 2)
    signal, noise = math.log(3.0) ** 2 + 1.0, math.log(3.0) ** 2 + 2.0
    assert entry.logits_sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert entry.reference_top1_percent == 100.0
    assert entry.top1_percent == 50.0
    assert entry.top1_drop_pp == 50.0


def test_gain_is_a_negative_drop():
    entry = measured(FOUND, -FOUND, labels=FOUND.argmax(1))

    assert entry.top1_drop_pp == -100.0


def test_model_agrees_with_itself_entirely():
    entry = measured(FOUND, FOUND, labels=LABELS)

    assert entry.agreement_percent == 100.0
    assert entry.mean_kl == 0.0
    assert entry.logits_sqnr_db == float("inf")
    assert entry.top1_drop_pp == 0.0


def test_fewer_than_five_classes_have_a_top5_of_all():
    entry = measured(FOUND[:, :3], labels=torch.tensor([2, 0, 0, 1]))

    assert entry.top5_percent == 100.0


def test_images_without_labels_give_no_accuracy():
    entry = measured(FOUND, FOUND)

    assert not entry.labelled
    assert entry.top1_percent is None
    assert entry.top5_percent is None
    assert entry.reference_top1_percent is None
    assert entry.agreement_percent == 100.0


def test_label_that_is_no_class_is_refused_by_the_image():
    with pytest.raises(
        InputError, match=r"array\[3\]: label 7 is no class .* has 7"
    ) as caught:
        measured(FOUND, labels=torch.tensor([0, 1, 6, 7]))

    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: OutputDict(hidden=0 * logits, logits=logits),
        lambda logits: OutputDict(probabilities=logits),
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: (logits, None),
        lambda logits: [logits],
    ],
)
def test_logits_are_found_in_any_form_of_output(wrap):
    predict = logits_of(lambda x: wrap(x + 1))

    assert torch.equal(predict(FOUND), FOUND + 1)


def test_modules_run_without_gradients(vit):
    entry = evaluate(
        vit, make_source(images(5)), reference=vit, execution="float", data="noise"
    )

    assert (entry.data, entry.execution, entry.images) == ("noise", "float", 5)
    assert entry.mean_kl == 0.0
    assert all(p.grad is None for p in vit.parameters())


def test_source_is_described():
    source = TensorSource(torch.zeros(6, 1, 2, 2), samples=4, seed=3)

    entry = evaluate(nn.Flatten(), source)

    assert entry.data == source.describe()
    assert entry.skipped == {}
    assert entry.seconds >= 0.0


def test_missing_and_broken_onnx_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"m\.onnx: file is missing"):
        onnx_predictor(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="onnxruntime cannot load it") as caught:
        onnx_predictor(tmp_path / "m.onnx")

    assert "\n" not in str(caught.value)


def onnx_identity(path, shape):
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["output"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "classes"])],
    )
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def test_images_of_another_size_are_refused(vit_graph, tmp_path):
    predict = onnx_predictor(onnx_identity(tmp_path / "m.onnx", ["batch", 3, 32, 32]))

    for model in (predict, vit_graph.logits, vit_graph):
        with pytest.raises(InputError, match=r"expected images of .*32.* found .*48"):
            model(images(2, 48))
    with pytest.raises(InputError, match="expected images of"):
        measure_activations(vit_graph, make_source(images(2, 48)))


def test_files_of_any_image_size_take_any(tmp_path):
    predict = onnx_predictor(
        onnx_identity(tmp_path / "m.onnx", ["batch", 3, "height", "width"])
    )

    assert predict(images(2, 8)).shape == (2, 192)
    with pytest.raises(InputError):
        predict(torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError):
        predict(torch.zeros(2, 3, 8))
