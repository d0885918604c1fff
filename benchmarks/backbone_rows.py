"""When does a row of the backbone matrix pass, and what got worse since another run?

A row is a JSON object as ``bench_backbones.py`` writes it; what a failed stage would have
measured is absent from it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitcompress.errors import UnsupportedModelError

Row = Mapping[str, Any]

#: Largest difference from eager, relative to the largest logit.
MOST_CAPTURE_ERROR = 1e-5
LEAST_SQNR_DB = 20.0
MOST_CAPTURE_SECONDS = 12.0
#: Below this, little of what happens in the blocks reaches the logits.
LEAST_LIVELINESS = 1e-3
#: The scheme that must keep :data:`LEAST_SQNR_DB`; narrower ones are only reported.
JUDGED = "W8A8"
#: Exit code of a model that is not supported.
REFUSED = UnsupportedModelError.exit_code
#: Shown of the sites at fault.
SHOWN = 5


def problems(row: Row) -> list[str]:
    """Return why a row does not pass; nothing if it does."""
    failures = row.get("failures", [])
    refused = row.get("refused", "")
    if refused:
        return _wrong_refusal(refused, failures)
    found = [f"{f['stage']}: {f['type']}: {f['message']}" for f in failures]
    for batch, error in row.get("capture_error", {}).items():
        # Written so that NaN is a problem too.
        if not error <= MOST_CAPTURE_ERROR:
            found.append(
                f"captured differs from eager by {error:.1e} at batch {batch}, "
                f"expected at most {MOST_CAPTURE_ERROR:.0e}"
            )
    seconds = row.get("seconds", {}).get("capture", 0.0)
    if seconds > MOST_CAPTURE_SECONDS:
        found.append(f"capture took {seconds:.1f} s, expected {MOST_CAPTURE_SECONDS:.0f} s")
    for name, scheme in row.get("schemes", {}).items():
        found.extend(f"{name}: {problem}" for problem in _scheme_problems(name, scheme))
    return found


def _wrong_refusal(expected: str, failures: Sequence[Row]) -> list[str]:
    wanted = f"wrong refusal: expected exit code {REFUSED} and a message with '{expected}'"
    if not failures:
        return [f"{wanted}, found no refusal"]
    first = failures[0]
    if expected in first["message"] and first["exit_code"] == REFUSED:
        return []
    found = f"{first['stage']}: {first['type']} (exit code {first['exit_code']})"
    return [f"{wanted}, found {found}: {first['message']}"]


def _scheme_problems(name: str, scheme: Row) -> list[str]:
    found = []
    for kind in ("linears", "convs"):
        left = scheme.get(kind, {}).get("unexplained", [])
        if left:
            more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
            listed = ", ".join(left[:SHOWN]) + more
            found.append(f"{len(left)} {kind} are float without a reason: {listed}")
    sqnr = scheme.get("sqnr_db")
    if name == JUDGED and sqnr is not None and not sqnr >= LEAST_SQNR_DB:
        found.append(f"SQNR {sqnr:.1f} dB, expected at least {LEAST_SQNR_DB:.0f} dB")
    if scheme.get("same_bits") is False:
        found.append("the loaded artefact computes other values than the saved model")
    return found


def notes(row: Row) -> list[str]:
    """Return what a reader of a row must know to believe its figures."""
    lively = row.get("liveliness", {})
    texts = {
        "spread": "logits hardly vary between images",
        "block_effect": "a disturbed block hardly changes the logits",
    }
    return [
        f"{text} ({lively[name]:.0e} of the largest)"
        for name, text in texts.items()
        if name in lively and lively[name] < LEAST_LIVELINESS
    ]


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a results file by model; the last one of a model counts."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["model"]: row for row in map(json.loads, lines)}


def regressions(
    baseline: Mapping[str, Row], rows: Mapping[str, Row], tier: int = 1
) -> list[str]:
    """Return a line for each model of a tier that passed in ``baseline`` and now does not."""
    found = []
    for model, before in baseline.items():
        if before["tier"] != tier or not before["passes"]:
            continue
        now = rows.get(model)
        if now is None:
            found.append(f"{model}: passed on {before['date']}, has no row now")
        elif not now["passes"]:
            reasons = "; ".join(now["problems"])
            found.append(f"{model}: passed on {before['date']}, now: {reasons}")
    return found
