"""The baseline file: read with the line of a mistake, written with the comments kept."""

import re
import textwrap

import numpy as np
import pytest
from results import DIGEST, IMAGES, make_result

from vitcompress.errors import ConfigError, InputError
from vitcompress.gate import read_baseline, update_baseline
from vitcompress.gate.baseline import pack_bits, unpack_bits
from vitcompress.results import CellName

BITS = pack_bits([True] * 12 + [False] * 4)
TEXT = f"""\
schema: 1  # of this file
models:
  toy:
    digest: "{DIGEST}"
    images: {{digest: "{IMAGES}", count: 16, source: 16 images}}
    schemes:
      W4A4:  # narrow
        repq_vit:
          top1: {{value: 75.0, tolerance: 0.5}}
          size: {{value: 4000, tolerance: 10}}
          seeds:
            0: {{correct: "{BITS}", agrees: "{BITS}"}}
"""
TOY = CellName("toy", "W4A4", "repq_vit")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "baseline.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("images", [1, 7, 8, 9, 1000])
def test_bits_come_back(images):
    outcomes = np.random.default_rng(images).random(images) < 0.8

    text = pack_bits(outcomes.tolist())

    assert len(text) == 2 * -(-images // 8)
    assert (unpack_bits(text, images) == outcomes).all()


def test_first_image_is_the_highest_bit():
    assert pack_bits([True, False, False, False, True]) == "88"


def test_file_is_read_with_its_limits(file):
    cell = read_baseline(file).cells()[TOY]

    assert list(cell.limits) == ["top1", "size"]
    assert (cell.limits["top1"].value, cell.limits["top1"].tolerance) == (75.0, 0.5)
    assert cell.execution == "simulated"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "tolerance: 0.5",
            "tolerence: 0.5",
            9,
            "unknown key; did you mean 'tolerance'?; known: ['value', 'tolerance']",
        ),
        ("top1:", "top_1:", 9, "unknown key; did you mean 'top1'?"),
        ("images:", "image:", 5, "unknown key; did you mean 'images'?"),
        ("schema: 1 ", "shema: 1 ", 1, "unknown key; did you mean 'schema'?"),
        ("agrees:", "agree:", 12, "unknown key; did you mean 'agrees'?"),
        (", tolerance: 10", "", 10, "key 'tolerance' is missing"),
        ("value: 4000", "value: four", 10, "Input should be a valid number"),
        ("value: 4000", "value: .nan", 10, "finite number"),
        ("tolerance: 10", "tolerance: -10", 10, "greater than or equal to 0"),
        ("tolerance: 10", "tolerance: yes", 10, "Input should be a valid number"),
        ("schema: 1 ", "schema: 2 ", 1, "Input should be 1"),
        ("count: 16", "count: 0", 5, "greater than or equal to 1"),
        ("            0:", "            zero:", 12, "valid integer"),
        ("value: 75.0", "value: 80.0", 3, "top1 says 80 %, its images say 75 %"),
        ("count: 16", "count: 24", 3, "expected bits of 24 images, found 16"),
        (f'correct: "{BITS}"', 'correct: "zzzz"', 3, "non-hexadecimal"),
        (f'correct: "{BITS}", ', "", 3, "seed 0 lacks 'correct', which top1 needs"),
    ],
)
def test_mistake_is_told_with_its_line(file, old, new, line, words):
    assert old in TEXT
    file.write_text(TEXT.replace(old, new, 1))

    with pytest.raises(ConfigError) as caught:
        read_baseline(file)

    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; delete it"),
        ("# nothing but a remark\n", "is empty"),
        ("- a\n- b\n", ":1: expected a mapping with keys 'schema' and 'models'"),
        ("just words", ":1: expected a mapping"),
        ("schema: 1\nmodels: {a: [}\n", ":2: not valid YAML"),
        ("schema: 1\nschema: 1\nmodels: {}\n", ":2: not valid YAML: found duplicate key"),
        ("schema: 1\n\tmodels: {}\n", "not valid YAML"),
        ("schema: 1\nmodels: &a [*a]\n", ":2: models: Input should be a valid dictionary"),
        ("models: " + 3000 * "{a: " + 3000 * "}", "not valid YAML"),
        ("schema: 1\nmodels:\n", ":2: models: Input should be a valid dictionary"),
        ("schema: 1\n", ":1: key 'models' is missing"),
        ("a: \x00\n", "not valid YAML"),
    ],
)
def test_file_that_is_no_baseline_is_refused(file, text, words):
    file.write_text(text)

    with pytest.raises(ConfigError, match=r"baseline\.yaml") as caught:
        read_baseline(file)

    assert words in str(caught.value)


def test_bytes_that_are_no_text_are_refused(file):
    file.write_bytes(b"\xff\xfe\x00schema")

    with pytest.raises(ConfigError, match="not valid YAML"):
        read_baseline(file)


@pytest.mark.parametrize(("limits", "words"), [("", "limits nothing"), ("x", "has no seeds")])
def test_cell_that_says_nothing_is_refused(file, limits, words):
    text = re.sub(r" +(top1|size):.*\n", "", TEXT) if not limits else TEXT
    file.write_text(re.sub(r"seeds:\n.*", "seeds: {}", text) if limits else text)

    with pytest.raises(ConfigError, match=words):
        read_baseline(file)


def test_missing_file_tells_how_to_write_one(tmp_path):
    with pytest.raises(ConfigError, match="file is missing; --update-baseline writes one"):
        read_baseline(tmp_path / "none.yaml")


# Writing


def grid(**changes):
    return [
        make_result(scheme=scheme, seed=seed, wrong=range(seed, seed + errors), **changes)
        for scheme, errors in (("W8A8", 4), ("W4A4", 20))
        for seed in (0, 1)
    ]


def test_new_file_holds_every_cell_and_is_read_back(tmp_path):
    path = tmp_path / "sub" / "baseline.yaml"

    done = update_baseline(path, grid())

    assert done == {"toy / W8A8 / repq_vit": "added", "toy / W4A4 / repq_vit": "added"}
    cell = read_baseline(path).cells()[TOY]
    assert {name: limit.value for name, limit in cell.limits.items()} == {
        "top1": 90.0,
        "agreement": 90.0,
        "size": 4000,
    }
    bits = unpack_bits(cell.seeds[1].correct, 200)
    assert np.flatnonzero(~bits).tolist() == list(range(1, 21))
    assert path.read_text().startswith("# Accepted figures, checked by `vitcompress gate`.")


def test_same_results_leave_the_file_as_it_is(tmp_path):
    path = tmp_path / "baseline.yaml"
    update_baseline(path, grid())
    before = path.read_bytes()

    done = update_baseline(path, grid())

    assert set(done.values()) == {"as it was"}
    assert path.read_bytes() == before


def test_update_keeps_comments_order_and_tolerances(tmp_path):
    path = tmp_path / "baseline.yaml"
    path.write_text(
        textwrap.dedent(
            f"""\
            # Ours.
            schema: 1
            models:
              # The small one.
              toy:
                digest: "{DIGEST}"
                images: {{digest: "{IMAGES}", count: 16, source: 16 images}}
                schemes:
                  W4A4:
                    repq_vit:  # for phones
                      size: {{value: 4000, tolerance: 25}}  # agreed in May
                      # top-1 comes second here
                      top1: {{value: 75.0, tolerance: 0.25}}
                      seeds:
                        0: {{correct: "{BITS}", agrees: "{BITS}"}}
                        7: {{correct: "{BITS}", agrees: "{BITS}"}}
            # The end.
            """
        )
    )

    update_baseline(path, [make_result(wrong=range(2), images=16, size_bytes=3000)])

    new = pack_bits([False] * 2 + [True] * 14)
    assert path.read_text() == textwrap.dedent(
        f"""\
        # Ours.
        schema: 1
        models:
          # The small one.
          toy:
            digest: "{DIGEST}"
            images: {{digest: "{IMAGES}", count: 16, source: 16 images}}
            schemes:
              W4A4:
                repq_vit:  # for phones
                  size: {{value: 3000, tolerance: 25}}  # agreed in May
                  # top-1 comes second here
                  top1: {{value: 87.5, tolerance: 0.25}}
                  seeds:
                    0: {{correct: "{new}", agrees: "{new}"}}
                  execution: simulated
        # The end.
        """
    )


def test_metric_that_its_owner_took_out_stays_out(tmp_path):
    path = tmp_path / "baseline.yaml"
    update_baseline(path, grid())
    path.write_text(re.sub(r" +agreement:.*\n", "", path.read_text()))

    update_baseline(path, grid(size_bytes=1))

    assert {tuple(cell.limits) for cell in read_baseline(path).cells().values()} == {
        ("top1", "size")
    }


def test_cells_without_a_result_stay(tmp_path):
    path = tmp_path / "baseline.yaml"
    update_baseline(path, grid())
    before = read_baseline(path).cells()[TOY]

    done = update_baseline(path, [r for r in grid(size_bytes=9) if r.origin.scheme == "W8A8"])

    assert done == {
        "toy / W8A8 / repq_vit": "changed",
        "toy / W4A4 / repq_vit": "kept; it has no result",
    }
    assert read_baseline(path).cells()[TOY] == before


@pytest.mark.parametrize("change", ["model_digest", "images"])
def test_half_an_update_to_another_model_or_other_images_is_refused(tmp_path, change):
    path = tmp_path / "baseline.yaml"
    update_baseline(path, grid())
    before = path.read_bytes()
    new = grid(model_digest="aa" * 32)[:2]
    if change == "images":
        new = [other_images(result) for result in grid()[:2]]

    with pytest.raises(InputError, match=r"toy / W4A4 / repq_vit: has no result, and the"):
        update_baseline(path, new)

    assert path.read_bytes() == before


def other_images(result):
    images = result.origin.evaluation.model_copy(update={"digest": "0" * 64})
    origin = result.origin.model_copy(update={"evaluation": images})
    return result.model_copy(update={"origin": origin})


def test_without_labels_agreement_alone_is_limited(tmp_path):
    path = tmp_path / "baseline.yaml"

    update_baseline(path, [make_result(wrong=range(3), labelled=())])

    cell = read_baseline(path).cells()[TOY]
    assert list(cell.limits) == ["agreement", "size"]
    assert cell.seeds[0].correct is None


def test_figure_that_is_limited_and_not_measured_is_not_dropped(tmp_path):
    path = tmp_path / "baseline.yaml"
    update_baseline(path, [make_result(latency_ratio=2.0)])

    with pytest.raises(
        InputError, match="limits latency_ratio, but a result has not measured"
    ):
        update_baseline(path, [make_result()])


def test_nothing_is_written_from_nothing(tmp_path):
    with pytest.raises(InputError, match="no results; sweep at least one cell"):
        update_baseline(tmp_path / "baseline.yaml", [])

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["null", "1.5", "*", "a: b", "# x", "yes", "m\nn", "é / ü"])
def test_any_name_of_a_model_survives(tmp_path, name):
    path = tmp_path / "baseline.yaml"

    update_baseline(path, [make_result(model=name)])
    update_baseline(path, [make_result(model=name)])

    assert list(read_baseline(path).models) == [name]
