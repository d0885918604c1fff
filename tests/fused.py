"""Fused attention in plain words, in the place of a runtime's operator."""

from torch import nn

from vitcompress.export.onnx.attention import fusable_attentions, place_attention


class Reference(nn.Module):
    """What a runtime's fused attention computes from ``[B, N, H D]``, in plain words.

    Or from ``[B, H, N, D]``; the result is arranged as the query.
    """

    def __init__(self, heads, scale):
        super().__init__()
        self.heads, self.scale = heads, scale

    def forward(self, query, key, value, bias=None):
        if query.dim() == 4:
            return self.core(query, key, value, bias)
        by_heads = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        return self.core(*by_heads, bias).transpose(1, 2).flatten(2)

    def core(self, query, key, value, bias):
        scores = self.scale * (query @ key.transpose(2, 3))
        scores = scores if bias is None else scores + bias
        return scores.softmax(dim=-1) @ value


def fused_graph(graph):
    """Return a copy of a graph with every fusable core replaced, and their number."""
    copy = graph.clone()
    found, _ = fusable_attentions(copy)
    for index, fused in enumerate(found):
        name = f"fused.{index}"
        copy.module.add_submodule(name, Reference(fused.heads, fused.scale))
        place_attention(copy, fused, name)
    copy.recompile()
    return copy, len(found)
