"""Results of sweeps, made up: what gates, comparisons and pages read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitcompress.report import (
    CompressionReport,
    EvaluationEntry,
    PassEntry,
    ProtocolEntry,
    SiteEntry,
    SizeEntry,
)
from vitcompress.result import ImageSet, Origin, Outcomes, Result
from vitcompress.sweep import FailedCell, GridCell, SweepIndex

DIGEST = "d1" * 32
IMAGES = "e2" * 32
CLASSES = 10


def make_result(
    *,
    model: str = "toy",
    scheme: str = "W4A4",
    recipe: str = "repq_vit",
    seed: int = 0,
    wrong: Sequence[int] = (),
    images: int = 200,
    labelled: Sequence[int] | None = None,
    size_bytes: int = 4000,
    sites: Sequence[SiteEntry] | None = None,
    **changes: Any,
) -> Result:
    """Return a result whose compressed model errs on the images ``wrong``, and the float model
    on none.

    Args:
        wrong: Numbers of the images.
        images: How many there are.
        labelled: Numbers of those with a label; all by default.
        size_bytes: Storage of the compressed model.
        **changes: Fields of ``Result`` or ``Origin``.
    """
    truth = np.random.default_rng(0).integers(0, CLASSES, images).tolist()
    known = set(range(images) if labelled is None else labelled)
    errors = set(wrong)
    found = [(c + 1) % CLASSES if n in errors else c for n, c in enumerate(truth)]
    fields: dict[str, Any] = {
        "model": model,
        "model_digest": DIGEST,
        "recipe": recipe,
        "scheme": scheme,
        "resolved_recipe": f"schema: 1\nname: {recipe}\nscheme: {scheme}\nseed: {seed}\n",
        "seed": seed,
        "calibration": ImageSet(source="32 images", ids=("c0", "c1"), digest="c0" * 32),
        "evaluation": ImageSet(
            source=f"{images} images",
            ids=tuple(f"image{n}" for n in range(images)),
            digest=IMAGES,
        ),
        "versions": {"torch": "2.14.1", "vitcompress": "0.1.0"},
    }
    fields |= {key: changes.pop(key) for key in list(changes) if key in fields}
    outcomes = Outcomes(
        labels=tuple(c if n in known else None for n, c in enumerate(truth)),
        predictions=tuple(found),
        in_top5=tuple(True if n in known else None for n in range(images)),
        reference_predictions=tuple(truth),
        kl=tuple(0.5 if n in errors else 0.01 for n in range(images)),
    )
    report = make_report(
        model=model,
        recipe=f"{recipe}-{scheme.lower()}",
        scheme=scheme,
        seed=seed,
        size_bytes=size_bytes,
        sites=make_sites(scheme) if sites is None else sites,
        right=images - len(errors),
        images=images,
    )
    return Result(
        **{
            "origin": Origin(**fields),
            "execution": "simulated",
            "outcomes": outcomes,
            "report": report,
            "seconds": 12.5,
            "command": "vitcompress sweep toy.pt",
            **changes,
        }
    )


def make_sites(scheme: str = "W4A4", blocks: int = 2, **changes: float) -> list[SiteEntry]:
    """Return sites of a plain network; ``changes`` are dB added to named sites."""
    weight_bits, activation_bits = int(scheme[1]), int(scheme[3])
    sites = []
    for index in range(blocks):
        for layer in ("qkv", "proj", "fc1", "fc2"):
            name = f"blocks.{index}.{layer}"
            for role, bits in (("weight", weight_bits), ("norm_output", activation_bits)):
                end = "weight" if role == "weight" else "input"
                site = f"{name}:{end}"
                extra = changes.get(site.replace(".", "_").replace(":", "_"), 0.0)
                measured = {"low": -1.5 - index, "high": 2.0, "rms": 0.7, "peak_ratio": 3.0}
                sites.append(
                    SiteEntry(
                        site=site,
                        role=role,
                        operation="linear",
                        spec=f"u{bits} per_channel",
                        bits=bits,
                        sqnr_db=6.0 * bits - index + extra,
                        **(measured if role != "weight" else {}),
                    )
                )
        sites.append(
            SiteEntry(
                site=f"blocks.{index}.attn:probs",
                role="probs",
                operation="matmul",
                spec=None,
                bits=None,
                sqnr_db=None,
            )
        )
    return sites


def make_report(
    *,
    model: str,
    recipe: str,
    scheme: str,
    seed: int,
    size_bytes: int,
    sites: Sequence[SiteEntry],
    right: int,
    images: int,
) -> CompressionReport:
    bits = int(scheme[1])
    share = 100.0 * right / max(images, 1)
    return CompressionReport(
        model=model,
        recipe=recipe,
        scheme=scheme,
        protocol=ProtocolEntry(
            source="32 images",
            sample_ids=("c0", "c1"),
            source_digest="c0" * 32,
            preprocessing={"size": [32, 32]},
            seed=seed,
            versions={"torch": "2.14.1"},
        ),
        passes=(
            PassEntry(
                name="attach",
                changed=16,
                found=18,
                skipped={site.site: "skipped by a rule" for site in sites if not site.spec},
                warnings=(),
                details={},
                function_change=None,
                seconds=0.1,
                peak_memory_bytes=10**8,
            ),
        ),
        stages=(),
        sites=tuple(sites),
        size=SizeEntry(
            float_bytes=32000,
            stored_bytes=size_bytes,
            ratio=size_bytes / 32000,
            bits_per_weight=bits + 0.5,
            quantized_weight_bits=float(bits),
            quantized_weights=7000,
            float_weights=1000,
            largest_float_tensors={"pos_embed": 2000, "norm.weight": 128},
        ),
        evaluations=(
            EvaluationEntry(
                data=f"{images} images",
                images=images,
                labelled=True,
                execution="simulated",
                top1_percent=share,
                agreement_percent=share,
                seconds=1.0,
            ),
        ),
    )


def write_sweep(
    folder: Path, results: Sequence[Result], failed: Mapping[int, str] | None = None
) -> Path:
    """Write results as a sweep does, with its index.

    Args:
        failed: Errors by position: these have no result.
    """
    failed = failed or {}
    origins = [result.origin for result in results]
    first = results[0].outcomes
    index = SweepIndex(
        model=origins[0].model,
        model_digest=origins[0].model_digest,
        schemes=tuple(dict.fromkeys(origin.scheme for origin in origins)),
        recipes=tuple(dict.fromkeys(origin.recipe for origin in origins)),
        seeds=tuple(dict.fromkeys(origin.seed for origin in origins)),
        cells=tuple(
            GridCell(key=o.key(), recipe=o.recipe, scheme=o.scheme, seed=o.seed)
            for o in origins
        ),
        evaluation=origins[0].evaluation,
        reference=first.model_copy(update={"predictions": first.reference_predictions}),
        float_bytes=32000,
        command="vitcompress sweep toy.pt",
    )
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "failed").mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(index.model_dump_json())
    for number, result in enumerate(results):
        name = f"{result.origin.key()}.json"
        if number in failed:
            entry = FailedCell(origin=result.origin, error=failed[number])
            (folder / "failed" / name).write_text(entry.model_dump_json())
        else:
            (folder / "cells" / name).write_text(result.to_json())
    return folder
