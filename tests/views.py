"""Tensors of all layouts, for hypothesis."""

import torch
from hypothesis import strategies as st


@st.composite
def views(draw):
    """Views of all kinds: slices with steps and offsets, transposed, expanded, empty, scalar."""
    shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8]))
    tensor = (torch.rand([n * 3 + 1 for n in shape]) * 9).to(dtype)
    for dim, n in enumerate(shape):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 2))
        tensor = tensor[(*[slice(None)] * dim, slice(start, start + n * step, step))]
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, draw(st.integers(1, tensor.dim() - 1)))
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(draw(st.integers(1, 3)), *tensor.shape)
    return tensor
