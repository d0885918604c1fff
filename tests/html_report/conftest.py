import pytest
from results import DIGEST, make_result, make_sites, write_sweep

from vitcompress.analyze import Analysis, AnalysisEntry, Distance
from vitcompress.result import ImageSet
from vitcompress.sweep import read_sweep


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """A sweep of two recipes, three schemes and two seeds, of which one cell failed."""
    sizes = {"W8A8": 8000, "W4A8": 5000, "W4A4": 5000}
    losses = {"W8A8": 4, "W4A8": 10, "W4A4": 40}
    results = [
        make_result(
            scheme=scheme,
            recipe=recipe,
            seed=seed,
            wrong=range(losses[scheme] + 2 * seed + (recipe == "deploy")),
            size_bytes=sizes[scheme],
            sites=make_sites(scheme, blocks=3, blocks_2_fc2_input=-15.0),
        )
        for recipe in ("repq_vit", "deploy")
        for seed in (0, 1)
        for scheme in ("W4A4", "W8A8", "W4A8")
    ]
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    error = "internal error; please report it\nTraceback\nValueError: <no>\n"
    return read_sweep(write_sweep(folder, results, failed={len(results) - 1: error}))


@pytest.fixture(scope="session")
def named(tmp_path_factory):
    """A sweep whose names try to be markup."""
    folder = tmp_path_factory.mktemp("named") / "sweep"
    sites = [
        site.model_copy(update={"site": f"<img src=x onerror=alert(1)>$a_{number}$\x00:input"})
        for number, site in enumerate(make_sites())
    ]
    result = make_result(
        model="</title><script>alert('m')</script>|*m*",
        recipe='"><svg onload=alert(1)>&amp;',
        resolved_recipe="</pre><script>alert('r')</script>\nname: x\n",
        sites=sites,
        versions={"<b>lib</b>": "\x1b[31m1.0"},
    )
    return read_sweep(write_sweep(folder, [result]))


@pytest.fixture(scope="session")
def analysis():
    """An analysis of the model of ``swept``: two blocks, and two of their sites."""
    images = ImageSet(source="16 images", ids=tuple("ab"), digest="a0" * 32)

    def distance(kl):
        return Distance(mean_kl=kl, logits_sqnr_db=-10 * kl, agreement_percent=100 - 50 * kl)

    units = [
        ("blocks.1", "block", 1.5),
        ("blocks.0", "block", 0.5),
        ("blocks.1.fc2:input", "site", 1.25),
        ("<i>blocks.1.fc1</i>:input", "site", 0.25),
    ]
    entries = tuple(
        AnalysisEntry(
            unit=unit,
            level=level,
            sites=(unit,),
            formats=("u4 per_tensor",),
            distance=distance(kl),
            kl_rank=1 + number % 2,
            sqnr_rank=1 + number % 2,
        )
        for number, (unit, level, kl) in enumerate(units)
    )
    return Analysis(
        model="toy",
        model_digest=DIGEST,
        recipe="repq_vit-w4a4",
        scheme="W4A4",
        resolved_recipe="name: repq_vit\n",
        seed=0,
        mode="only",
        by="site",
        calibration=images,
        images=images,
        all_on=distance(1.75),
        all_off=distance(0.0),
        entries=entries,
        not_measured=("blocks.0.fc1:input",),
        budget_seconds=5.0,
        seconds=5.5,
        versions={},
    )
