"""Tasks of a block walk without the walk."""

from tiny import make_source, smooth_images

from vitcompress.engine.blocks import BlockWalk
from vitcompress.graph.patterns import blocks
from vitcompress.passes.blocks import BlockOutcome, BlockSettings


def tasks_of(
    graph, teacher, use, *, count=12, inputs="both", held_out=0.25, batch_size=4, seed=7
):
    """Call ``use`` with each task of a walk; return what it returned, by path.

    Tasks are only valid during the walk, so what needs one runs inside ``use``. Outcomes that
    ``use`` returns are put into the graph; anything else is not.
    """
    found = {}

    def fit(task):
        found[task.path] = use(task)
        outcome = found[task.path]
        return outcome if isinstance(outcome, BlockOutcome) else BlockOutcome()

    walk = BlockWalk(
        graph,
        teacher,
        BlockSettings(device="cpu", held_out=held_out, batch_size=batch_size),
        seed,
        None,
        blocks,
    )
    source = make_source(smooth_images(count, seed=11), batch_size=4)
    walk.run(source, inputs, fit, answers=True)
    return found
