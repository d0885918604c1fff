"""Pure tensor maths: no graph, no modules, no state."""
