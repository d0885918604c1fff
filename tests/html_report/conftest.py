import pytest
from results import make_result, make_sites, write_sweep

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
